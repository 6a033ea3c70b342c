"""Sessions on disk: what is saved comes back to the last bit, only the new is written, nothing is lost."""

import errno
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from offload_triforce.errors import BusyError, InputError, StorageError
from offload_triforce.runtime import session_files, session_folder, shard_writer
from offload_triforce.runtime.held import HeldText, KVShape
from offload_triforce.runtime.session_files import (
    describe,
    list_texts,
    open_text,
    remove_text,
    save_text,
    verify_text,
)
from offload_triforce.runtime.session_folder import LOCK, MANIFEST, load_manifest, locked
from offload_triforce.runtime.shard_header import PAGE
from tests.runtime.saved_texts import IDENTITY, bits, check_same, make_text

BLOCK = 16


def save(folder, text, identity=IDENTITY, **options):
    return save_text(folder, text, identity, block=BLOCK, **options)


def reopen(folder, text, identity=IDENTITY, **options):
    return open_text(folder, identity, text.shape, **options)


def files(folder):
    return {path.name: path.stat().st_ino for path in folder.iterdir() if path.name.endswith(".safetensors")}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "session"


@given(
    lengths=st.lists(
        st.one_of(st.integers(1, 70), st.sampled_from([15, 16, 17, 31, 32, 33, 48])), min_size=1, max_size=4
    ),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    layers=st.integers(0, 3),
    every=st.sampled_from([0, 5, 16]),
    fork=st.one_of(st.none(), st.integers(0, 40)),
    long=st.booleans(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trips(tmp_path_factory, lengths, dtype, layers, every, fork, long):
    """One save after the other to one folder: longer, shorter, another text from some token on."""
    folder = tmp_path_factory.mktemp("round") / "session"
    for turn, length in enumerate(lengths):
        text = make_text(
            length, layers=layers, dtype=dtype, every=every, fork=fork if turn % 2 else None, long=long and turn > 1
        )
        done = save(folder, text)
        check_same(reopen(folder, text), text)
        assert verify_text(folder).length == length == done.tokens
        named = {file.name for file, _ in load_manifest(folder).contents}
        assert files(folder).keys() == named  # nothing is left over
        assert done.size == sum(path.stat().st_size for path in folder.iterdir())


@given(st.integers(1, 80), st.data())
@settings(max_examples=30, deadline=None)
def test_any_part_of_it_can_be_read(tmp_path_factory, length, data):
    text, folder = make_text(length, layers=3), tmp_path_factory.mktemp("parts") / "session"
    save(folder, text)
    found = reopen(folder, text)
    for _ in range(6):
        layer, start = data.draw(st.integers(0, 2)), data.draw(st.integers(0, length))
        stop = data.draw(st.integers(start, length))
        assert torch.equal(bits(found.read(layer, start, stop)), bits(text.read(layer, start, stop)))
    for wrong in [(3, 0, 1), (-1, 0, 1), (0, -1, 1), (0, 0, length + 1), (0, 2, 1)]:
        with pytest.raises(IndexError):
            found.read(*wrong)


def test_only_the_new_is_written(folder):
    """Whole blocks of the common beginning stay, the very same files; the bytes are counted."""
    first, longer = make_text(5 * BLOCK + 3, every=BLOCK), make_text(7 * BLOCK + 5, every=BLOCK)
    done = save(folder, first)
    assert done.written == done.size
    before = files(folder)
    again = save(folder, longer)
    kept = before.keys() & files(folder).keys()
    assert {before[name] for name in kept} == {files(folder)[name] for name in kept}
    assert (
        len(kept) == 2 * 5 + 5
    )  # five whole blocks of each layer, and five checkpoints: the last was of another place
    new = files(folder).keys() - kept
    assert again.written == sum((folder / name).stat().st_size for name in [*new, MANIFEST])
    # Three blocks of two layers, two checkpoints and the one at the end, the ids.
    assert len(new) == again.files - 1 == 2 * 3 + 3 + 1
    check_same(reopen(folder, longer), longer)
    nothing = save(folder, longer)
    assert nothing.files == 2  # ids and manifest


@pytest.mark.parametrize(
    ("fork", "kept"),
    [(0, 0), (1, 0), (BLOCK - 1, 0), (BLOCK, 1), (BLOCK + 1, 1), (2 * BLOCK, 2), (3 * BLOCK - 1, 2), (3 * BLOCK, 3)],
)
def test_blocks_stay_up_to_the_token_where_texts_part(folder, fork, kept):
    one, other = make_text(3 * BLOCK + 9), make_text(3 * BLOCK + 9, fork=fork)
    save(folder, one)
    before = files(folder)
    save(folder, other)
    stayed = [name for name in before if name in files(folder) and name.startswith("kv-0001")]
    assert sorted(int(name.split("-")[2]) for name in stayed) == list(range(kept))
    check_same(reopen(folder, other), other)


def test_ids_alone_are_not_believed(folder):
    """The same tokens, read again in another way, have other last bits: those are what is saved."""
    one = make_text(4 * BLOCK)
    save(folder, one)
    changed = [kv.contiguous() for kv in one.kv]
    changed[-1].view(torch.int16)[:, :, 2 * BLOCK :] ^= 1  # from the third block on, in the last layer
    changed[0].view(torch.int16)[:, :, 2 * BLOCK + 3 :] ^= 1
    other = replace(one, kv=changed)
    save(folder, other)
    check_same(reopen(folder, other), other)
    kept = {name.split("-")[2] for name in files(folder) if name.startswith("kv")}
    assert kept == {f"{block:06d}" for block in range(4)}


def test_a_text_of_another_long_frequency_is_written_anew(folder):
    text = make_text(2 * BLOCK)
    save(folder, text)
    done = save(folder, replace(text, long=True))
    assert done.files >= 2 * 2
    assert reopen(folder, text).long


def test_a_lost_file_is_written_again(folder):
    text = make_text(3 * BLOCK)
    save(folder, text)
    (folder / load_manifest(folder).shards[0][1].name).unlink()
    with pytest.raises(InputError, match="is missing"):
        reopen(folder, text)
    save(folder, text)
    check_same(reopen(folder, text), text)


def test_a_session_is_saved_elsewhere_from_disk(tmp_path):
    text = make_text(3 * BLOCK + 1, every=7)
    save(tmp_path / "a", text)
    save(tmp_path / "b", reopen(tmp_path / "a", text))
    before = files(tmp_path / "b")
    done = save(tmp_path / "b", reopen(tmp_path / "b", text))
    assert done.files == 2  # ids and manifest
    assert len(before.keys() & files(tmp_path / "b").keys()) == len(before) - 1
    check_same(reopen(tmp_path / "b", text), text)


def test_anybody_can_read_the_shards(folder):
    """They are plain safetensors files; their tensors begin on a page."""
    text = make_text(BLOCK + 3, every=4)
    save(folder, text)
    manifest = load_manifest(folder)
    found = load_file(folder / manifest.shards[1][1].name)
    assert torch.equal(bits(found["kv"]), bits(text.read(1, BLOCK, BLOCK + 3)))
    assert load_file(folder / manifest.tokens.name)["tokens"].tolist() == text.tokens.tolist()
    parts = load_file(folder / manifest.points[0].file.name)
    assert all(torch.equal(bits(parts[name]), bits(part)) for name, part in text.checkpoints[0].parts.items())
    assert all((file.size - sum(t.size for t in tensors)) % PAGE == 0 for file, tensors in manifest.contents)


def test_a_checkpoint_is_read_when_it_is_asked_for(folder):
    text = make_text(40, every=10)
    save(folder, text)
    found = reopen(folder, text)
    for point in load_manifest(folder).points[:-1]:
        (folder / point.file.name).unlink()
    assert [point.size for point in found.checkpoints] == [point.size for point in text.checkpoints]
    assert set(found.checkpoints[0].parts) == set(text.checkpoints[0].parts)
    assert torch.equal(found.checkpoints[-1].parts["recurrent.state"], text.checkpoints[-1].parts["recurrent.state"])
    with pytest.raises(InputError, match="is missing"):
        found.checkpoints[0].parts["recurrent.state"]


def test_progress_is_told_in_bytes_and_in_the_callers_thread(folder):
    text, told, threads = make_text(5 * BLOCK), [], set()

    def progress(done, total):
        told.append((done, total))
        threads.add(threading.get_ident())

    done = save(folder, text, progress=progress)
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] == done.written - (folder / MANIFEST).stat().st_size
    told.clear()
    found = reopen(folder, text, progress=progress)
    for _ in range(2):
        for layer in range(2):
            found.read(layer, 0, 5 * BLOCK)
    assert told == sorted(set(told))
    assert told[-1][0] == told[-1][1] == sum(s.size for layer in load_manifest(folder).shards for s in layer)
    told.clear()
    verify_text(folder, progress)
    assert told[-1] == (load_manifest(folder).size,) * 2
    assert threads == {threading.get_ident()}


# Who may go on with it.


def refused_reading(folder, text, words, identity=IDENTITY, shape=None):
    with pytest.raises(InputError, match=words) as caught:
        open_text(folder, identity, shape or text.shape)
    assert "\n" not in str(caught.value)


def test_another_model_is_refused(folder):
    text = make_text(20)
    save(folder, text)
    refused_reading(folder, text, "another configuration", replace(IDENTITY, configuration="d" * 32))
    refused_reading(folder, text, "other weights", replace(IDENTITY, weights="d" * 32))
    refused_reading(folder, text, "another tokenizer", replace(IDENTITY, tokenizer="d" * 32))
    reopen(folder, text, replace(IDENTITY, tokenizer=""))
    shape = text.shape
    refused_reading(folder, text, "in bfloat16.*float32", shape=replace(shape, dtype=torch.float32))
    refused_reading(folder, text, "2 layers of 2 KV heads of 4, and this model has 3", shape=replace(shape, layers=3))
    refused_reading(folder, text, "KV heads of 8", shape=replace(shape, head_dim=8))


def test_a_session_of_another_model_is_not_replaced(folder):
    text = make_text(20)
    save(folder, text)
    before = files(folder)
    with pytest.raises(InputError, match="other weights"):
        save(folder, text, replace(IDENTITY, weights="d" * 32))
    with pytest.raises(InputError, match="another shape or dtype"):
        save(folder, make_text(20, dtype=torch.float16))
    assert files(folder) == before
    check_same(reopen(folder, text), text)


def test_where_it_cannot_be_saved(tmp_path):
    text = make_text(20)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        save(tmp_path / "file", text)
    with pytest.raises(InputError, match="below one"):
        save(tmp_path / "file" / "below", text)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"something else \(notes.txt\)"):
        save(tmp_path / "full", text)
    with pytest.raises(InputError, match="nothing to save"):
        save(tmp_path / "new", HeldText(text.tokens[:0], [], text.shape, text.kv))
    assert sorted(os.listdir(tmp_path)) == ["file", "full"]
    assert os.listdir(tmp_path / "full") == ["notes.txt"]


def test_a_text_that_does_not_fit_its_own_shape_is_not_saved(folder):
    text = make_text(20)
    for wrong in [
        replace(text, shape=KVShape(2, 2, 5, torch.bfloat16)),
        replace(text, tokens=torch.cat([text.tokens[:-1], torch.tensor([-1])])),
        replace(text, tokens=torch.cat([text.tokens[:-1], torch.tensor([2**31])])),
        replace(text, checkpoints=[*text.checkpoints, *text.checkpoints]),
    ]:
        with pytest.raises(ValueError, match=r"tokens|31 bits"):
            save(folder, wrong)
        assert not folder.exists()


# What is interrupted.


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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
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


# Two at once.


def test_two_processes_do_not_save_to_one_folder(folder):
    text = make_text(20)
    save(folder, text)
    code = (
        "import sys, time; from pathlib import Path; from offload_triforce.runtime.session_folder import locked\n"
        f"with locked(Path({str(folder)!r})):\n    print('locked', flush=True)\n    time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "locked\n"
        for work in (lambda: save(folder, make_text(30)), lambda: remove_text(folder)):
            with pytest.raises(BusyError, match="another process is saving"):
                work()
        check_same(reopen(folder, text), text)  # reading needs no lock
    finally:
        other.kill()
        other.wait()
    save(folder, make_text(30))  # whoever was killed holds nothing


def test_many_threads_save_to_one_folder(folder):
    """Each has it whole, or a sentence."""
    texts = [make_text(30 + i, fork=i) for i in range(8)]

    def attempt(text):
        try:
            save(folder, text)
            return True
        except BusyError:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert any(pool.map(attempt, texts))
    found = reopen(folder, texts[0])
    check_same(found, next(text for text in texts if torch.equal(text.tokens, found.tokens)))
    assert {file.name for file, _ in load_manifest(folder).contents} == files(folder).keys()


def test_a_lock_on_a_folder_that_was_removed_is_none(folder):
    save(folder, make_text(20))
    with locked(folder):
        (folder / LOCK).unlink()
        with locked(folder):  # nobody holds the new one
            pass


# Listing and removing.


def test_list_describe_remove(tmp_path):
    assert list_texts(tmp_path / "nowhere") == []
    for name, tokens in (("b", 20), ("a", 40)):
        save(tmp_path / name, make_text(tokens))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / MANIFEST).write_text("{}")
    (tmp_path / "other").mkdir()
    found = list_texts(tmp_path)
    assert [(one.name, one.manifest and one.manifest.length) for one in found] == [("a", 40), ("b", 20), ("c", None)]
    assert "damaged" in found[2].problem
    (tmp_path / "a" / "mine.txt").write_text("kept")
    size = sum(path.stat().st_size for path in (tmp_path / "a").iterdir()) - 4
    assert remove_text(tmp_path / "a") == size
    assert os.listdir(tmp_path / "a") == ["mine.txt"]
    remove_text(tmp_path / "b")
    remove_text(tmp_path / "c")
    assert sorted(os.listdir(tmp_path)) == ["a", "other"]
    for gone in ("a", "b", "other", "nowhere"):
        with pytest.raises(InputError, match="no session"):
            remove_text(tmp_path / gone)
    assert describe(tmp_path / "other").manifest is None


def test_ids_count_even_where_keys_do_not_tell(folder):
    """The last token of the second block is another one, with the same keys and values: that block is written anew."""
    one = make_text(3 * BLOCK)
    save(folder, one)
    before = files(folder)
    ids = one.tokens.clone()
    ids[2 * BLOCK - 1] += 1
    save(folder, replace(one, tokens=ids))
    stayed = {name.split("-")[2] for name in before.keys() & files(folder).keys() if name.startswith("kv")}
    assert stayed == {"000000"}
