"""Saves that are killed, in a process of its own: ``python -m tests.runtime.killed_saves FOLDER COUNT [SEED]``.

Children are forked from here, where torch has one thread, and killed as they save: at the steps that a save takes on
the disk, one after the other, and ``COUNT`` of them at random moments. After each, what the folder holds has to be the
session before or the session after, whole.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from offload_triforce.runtime import session_files, session_folder, shard_writer
from offload_triforce.runtime.session_files import open_text, save_text, verify_text
from tests.runtime.saved_texts import IDENTITY, check_same, make_text

BLOCK = 64
STEPS = ("open", "write", "fsync", "close", "replace", "unlink")


def text_of(turn):
    """Longer, shorter, another from some token on."""
    return make_text(150 + turn * 37 % 300, every=90, fork=turn * 53 % 400 if turn % 3 else None, layers=3)


def save(folder, turn, progress=None):
    save_text(folder, text_of(turn), IDENTITY, progress, block=BLOCK)


def check(folder, turns):
    """What is there is one of these turns' texts; returns which. None: nothing, which is one of them too."""
    if not (folder / session_folder.MANIFEST).exists():
        assert None in turns
        return None
    verify_text(folder)
    found = open_text(folder, IDENTITY, text_of(0).shape)
    for turn in turns:
        if turn is not None and torch.equal(found.tokens, text_of(turn).tokens):
            check_same(found, text_of(turn))
            return turn
    raise AssertionError(f"{len(found.tokens)} tokens are none of {turns}")


def forked(work):
    """The number of a child that does some work and ends."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    return child


class Counted:
    """``os`` for the modules that save: what is done to the disk is counted, and deadly at one of the steps."""

    def __init__(self, fatal):
        self.done, self.fatal = 0, fatal
        unlink = Path.unlink
        Path.unlink = lambda path, *args, **options: (self.count(), unlink(path, *args, **options))[1]
        session_files.os = shard_writer.os = session_folder.os = self

    def count(self):
        self.done += 1
        if self.done >= self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in STEPS:
            return real

        def counted(*args, **options):
            self.count()
            return real(*args, **options)

        return counted


def killed_at_each_step(folder):
    """From one text to another, over and over, killed a step later each time. Returns (steps, before, after)."""
    source = folder.parent / "source"
    save(source, 1)
    results = []
    reading, writing = os.pipe()

    def count_steps():
        counted = Counted(10**9)
        save(shutil.copytree(source, folder.parent / "counting"), 2)
        os.write(writing, str(counted.done).encode())

    os.waitpid(forked(count_steps), 0)
    steps = int(os.read(reading, 100))
    for fatal in sorted({*range(1, steps, 8), *range(steps - 20, steps + 1)}):  # all of the last, where it is decided
        target = shutil.copytree(source, folder.parent / f"at-{fatal}")

        def work(target=target, fatal=fatal):
            Counted(fatal)
            save(target, 2)

        assert os.WIFSIGNALED(os.waitpid(forked(work), 0)[1])
        results.append(check(target, [1, 2]))
        save(target, 3)  # whatever is left lying about is in nobody's way
        check_tidy(target, 3)
        shutil.rmtree(target)
    assert results == sorted(results)  # from one step on, it is the new one
    return steps, results.count(1), results.count(2)


def killed_at_random(folder, count, seed):
    """Returns (killed, before, after)."""
    save(folder, 0)
    started = time.perf_counter()
    save(folder, 1)
    span = time.perf_counter() - started
    held, chance, kills, results = 1, random.Random(seed), 0, []
    for turn in range(2, 2 + count):
        child = forked(lambda turn=turn: save(folder, turn))
        time.sleep(chance.random() * 1.3 * span)
        os.kill(child, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        now = check(folder, [held, turn])
        results.append(now == turn)
        held = now
    save(folder, turn + 1)
    check_tidy(folder, turn + 1)
    return kills, results.count(False), results.count(True)


def killed_at_first(folder):
    """Where there was nothing before: nothing, or the whole. Returns how often there was nothing."""
    nothing = 0
    for fatal in range(1, 140, 15):
        target = folder.parent / f"first-{fatal}"

        def work(target=target, fatal=fatal):
            Counted(fatal)
            save(target, 2)

        os.waitpid(forked(work), 0)
        nothing += check(target, [None, 2]) is None
        save(target, 3)
        check_tidy(target, 3)
    return nothing


def check_tidy(folder, turn):
    """It holds this turn's text, and no file of any other."""
    assert check(folder, [turn]) == turn
    named = {file.name for file, _ in session_folder.load_manifest(folder).contents}
    assert {path.name for path in session_folder.own_files(folder)} == named


def main(folder, count, seed=0):
    torch.set_num_threads(1)
    report = {"steps": killed_at_each_step(folder), "first": killed_at_first(folder)}
    print(json.dumps(report | {"random": killed_at_random(folder, count, seed)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *map(int, sys.argv[3:]))
