"""A save that is interrupted, or that the disk refuses, leaves the session that was there before."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from offload_triforce.errors import StorageError
from offload_triforce.runtime import session_files, session_folder, shard_writer
from offload_triforce.runtime.held import HeldText
from offload_triforce.runtime.session_folder import MANIFEST, load_manifest
from tests.runtime.saved_texts import check_same, files, make_text, reopen, save


def test_the_disk_is_full_before_it_begins(folder, monkeypatch):
    text = make_text(40)
    save(folder, text)
    before = files(folder)
    small = os.statvfs_result((4096, 4096, 100, 10, 10, 0, 0, 0, 0, 255))
    monkeypatch.setattr(session_files.os, "statvfs", lambda _: small)
    with pytest.raises(StorageError, match=r"takes 0.00 GB, and its disk has 0.00 GB left"):
        save(folder, make_text(60))
    assert files(folder) == before
    check_same(reopen(folder, text), text)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
@pytest.mark.parametrize("after", range(0, 14, 3))
@pytest.mark.parametrize("older", [True, False])
def test_the_disk_refuses_in_the_middle(folder, monkeypatch, number, after, older):
    text, calls, lock = make_text(40), [], threading.Lock()
    if older:
        save(folder, text)
    real = os.write

    def write(descriptor, data):
        with lock:
            calls.append(None)
            if len(calls) > after:
                raise OSError(number, os.strerror(number))
        return real(descriptor, data[: max(1, len(data) // 2)])  # as a disk may, less than it was given

    monkeypatch.setattr(shard_writer.os, "write", write)
    words = "is full" if number in (errno.ENOSPC, errno.EDQUOT) else "was not saved"
    with pytest.raises(StorageError, match=words) as caught:
        save(folder, make_text(77, fork=5))
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert folder.exists() == older  # a folder that was made for nothing is gone
    if older:
        assert {file.name for file, _ in load_manifest(folder).contents} == files(folder).keys()
        check_same(reopen(folder, text), text)


def test_a_limit_on_the_size_of_files(tmp_path):
    """The kernel's own refusal, in a process of its own."""
    code = f"""
import resource, signal, torch
from tests.runtime.saved_texts import *
from offload_triforce.runtime.session_files import *
from offload_triforce.errors import StorageError
text = make_text(40)
folder = __import__("pathlib").Path({str(tmp_path / "s")!r})
save_text(folder, text, IDENTITY)
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
try:
    save_text(folder, make_text(4000, fork=3), IDENTITY)
except StorageError as error:
    print(error)
check_same(open_text(folder, IDENTITY, text.shape), text)
print("as it was")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=500)
    assert "File too large" in done.stdout, done.stderr
    assert "as it was" in done.stdout


class _Interrupted(HeldText):
    """Ctrl-C while the second layer is read."""

    def read(self, layer, start, stop):
        if layer and start:
            raise KeyboardInterrupt
        return super().read(layer, start, stop)


@pytest.mark.parametrize("older", [True, False])
def test_ctrl_c(folder, older):
    text = make_text(40)
    if older:
        save(folder, text)
    with pytest.raises(KeyboardInterrupt):
        save(folder, _Interrupted(**vars(make_text(77, fork=5))))
    assert folder.exists() == older
    if older:
        check_same(reopen(folder, text), text)
        assert {file.name for file, _ in load_manifest(folder).contents} == files(folder).keys()


def test_an_interruption_after_the_new_manifest_is_in_place(folder, monkeypatch):
    """It counts then: what it names must not be cleared away."""
    save(folder, make_text(40))
    text, real = make_text(77, fork=5), os.replace

    def replace_and_stop(source, target):
        real(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(session_files.os, "replace", replace_and_stop)
    with pytest.raises(KeyboardInterrupt):
        save(folder, text)
    monkeypatch.undo()
    check_same(reopen(folder, text), text)


def test_on_disk_before_it_counts(folder, monkeypatch):
    """As a loss of power asks for: all files, their names, the manifest's name, and then the old ones go."""
    save(folder, make_text(40))
    done, lock, names = [], threading.Lock(), {}
    real = {name: getattr(os, name) for name in ("open", "fsync", "replace")}
    unlink = Path.unlink

    def note(what, path):
        with lock:
            done.append((what, Path(path).name))

    def opened(path, flags, *mode):
        descriptor = real["open"](path, flags, *mode)
        if flags & (os.O_WRONLY | os.O_DIRECTORY):
            names[descriptor] = path
            note("open", path)
        return descriptor

    monkeypatch.setattr(shard_writer.os, "open", opened)
    monkeypatch.setattr(shard_writer.os, "fsync", lambda d: (real["fsync"](d), note("fsync", names[d])))
    monkeypatch.setattr(session_files.os, "replace", lambda a, b: (note("replace", b), real["replace"](a, b)))
    monkeypatch.setattr(Path, "unlink", lambda path: (note("unlink", path), unlink(path)))
    before = files(folder)
    save(folder, make_text(40, fork=3))
    monkeypatch.undo()
    at = done.index(("replace", MANIFEST))
    synced = [name for what, name in done[:at] if what == "fsync"]
    assert files(folder).keys() - before.keys() <= set(synced)
    assert synced[-2:] == [session_folder.NEW_MANIFEST, folder.name]
    assert done[at + 1 : at + 3] == [("open", folder.name), ("fsync", folder.name)]
    removed = [i for i, (what, _) in enumerate(done) if what == "unlink"]
    assert removed
    assert min(removed) > at + 2
