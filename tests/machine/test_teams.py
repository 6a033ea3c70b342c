"""Teams of threads that OpenMP keeps: none is left where nobody computes."""

import os
import subprocess
import sys
import threading
import time
from functools import partial

import psutil
import pytest
import torch

from offload_triforce import TriForce
from offload_triforce.machine import teams
from offload_triforce.machine.teams import release_team
from tests.tiny import prompt_ids, tiny_model


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def threads(expected=None):
    """How many this process has, once they are as many as expected: those of a team end some time after it."""
    end = time.monotonic() + 5
    while (found := psutil.Process().num_threads()) != expected and time.monotonic() < end:
        if expected is None and time.monotonic() > end - 4.5:
            break
        time.sleep(0.01)
    return found


def compute():
    torch.ones(1_000_000).add_(1)


@pytest.mark.skipif(not teams._pauses(), reason="this torch does not use GCC's OpenMP")
def test_a_team_is_let_go_and_comes_back(three_threads):
    release_team()
    alone = threads()
    for _ in range(2):
        compute()
        assert threads(alone + 2) == alone + 2
        release_team()
        assert threads(alone) == alone
    release_team()  # there is none


@pytest.mark.skipif(not teams._pauses(), reason="this torch does not use GCC's OpenMP")
def test_only_this_threads_own(three_threads):
    computed, released = threading.Event(), threading.Event()

    def other():
        compute()
        computed.set()
        released.wait(30)
        compute()

    release_team()
    alone = threads()
    thread = threading.Thread(target=other)
    thread.start()
    computed.wait(30)
    release_team()
    time.sleep(0.3)  # for threads that should not end
    assert threads(alone + 3) == alone + 3
    released.set()
    thread.join()
    assert threads(alone) == alone


@pytest.mark.parametrize(
    "maps",
    [
        None,
        "7f00-7f01 r-xp 00000000 00:00 12  /lib/libc.so.6\n7f00-7f01 rw-p 00000000 00:00 0\n",
        "7f00-7f01 r-xp 00000000 00:00 12  /home/my user/lib/libgomp.so.1\n",
        "7f00-7f01 r-xp 00000000 00:00 12  /gone/libgomp-a34b3233.so.1 (deleted)\n",
        "7f00-7f01 r-xp 00000000 00:00 12  /caf\udcff/libgomp.so.1\n",
    ],
)
def test_where_there_is_no_such_library(monkeypatch, tmp_path, maps):
    """Or none that can be called: that is no reason to fail."""
    monkeypatch.setattr(teams, "_MAPS", tmp_path / "maps")
    if maps is not None:
        (tmp_path / "maps").write_bytes(os.fsencode(maps))
    assert teams._pauses.__wrapped__() == []


@pytest.mark.skipif(not teams._pauses(), reason="this torch does not use GCC's OpenMP")
def test_a_path_with_a_space(monkeypatch, tmp_path):
    path = next(line.split(maxsplit=5)[5] for line in teams._MAPS.read_text().splitlines() if "libgomp" in line)
    (tmp_path / "my lib").mkdir()
    (tmp_path / "my lib" / "libgomp.so.1").symlink_to(path)
    (tmp_path / "maps").write_text(f"7f00-7f01 r-xp 00000000 00:00 12  {tmp_path}/my lib/libgomp.so.1\n")
    monkeypatch.setattr(teams, "_MAPS", tmp_path / "maps")
    assert len(teams._pauses.__wrapped__()) == 1


@pytest.mark.skipif(not teams._pauses(), reason="this torch does not use GCC's OpenMP")
def test_a_child_process_waits_for_no_team_of_its_parents():
    script = """
import os, torch
from offload_triforce.machine.teams import release_team
torch.set_num_threads(3)
torch.ones(1_000_000).add_(1)
release_team(); torch.ones(1_000_000).add_(1)
child = os.fork()
if not child:
    release_team()
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "7", done.stderr


def test_an_engine_lets_it_go_when_it_has_been_made_and_after_each_answer(monkeypatch):
    """By the thread that has decoded."""
    calls = []
    for module in ("offload_triforce.engine", "offload_triforce.runtime.decoding"):
        monkeypatch.setattr(sys.modules[module], "release_team", lambda: calls.append(threading.current_thread().name))
    with TriForce(tiny_model("llama"), draft="ngram") as engine:
        assert calls == ["MainThread"]
        ask = partial(engine.generate, prompt_ids(20), max_new_tokens=4)
        thread = threading.Thread(target=ask, name="X")
        thread.start()
        thread.join()
        assert calls == ["MainThread", "X"]
        ask()
    assert calls == ["MainThread", "X", "MainThread"]
