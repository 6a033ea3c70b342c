"""Saved sessions that are damaged, or made up by somebody: refused in one sentence, and nothing is made for them."""

import copy
import json
import os
import shutil
import tracemalloc

import pytest
import torch

from offload_triforce.errors import InputError, StorageError
from offload_triforce.runtime import session_manifest, session_reader
from offload_triforce.runtime.session_check import verify_text
from offload_triforce.runtime.session_files import open_text, save_text
from offload_triforce.runtime.session_folder import MANIFEST, describe, load_manifest, remove_text
from offload_triforce.runtime.session_manifest import MOST_BYTES, ManifestError, read_manifest
from offload_triforce.runtime.shard_header import header_of
from tests.runtime.saved_texts import IDENTITY, check_same, make_text

TEXT = make_text(50, every=20, long=True, part=9)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "session"
    save_text(folder, TEXT, IDENTITY, block=16)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A copy to damage."""
    return shutil.copytree(whole, tmp_path / "session")


def read_all(folder):
    found = open_text(folder, IDENTITY, TEXT.shape)
    for layer in range(TEXT.shape.layers):
        found.read(layer, 0, len(found.tokens))
    for point in found.checkpoints:
        assert dict(point.parts)
    if found.part is not None:
        assert found.part.in_memory().size
    return found


def refused(work, folder, *words):
    with pytest.raises((InputError, StorageError)) as caught:
        work(folder)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert len(sentence) < 500
    assert str(folder) in sentence
    assert all(word in sentence for word in words), sentence


# Files.

FILES = {
    "manifest": lambda manifest: MANIFEST,
    "ids": lambda manifest: manifest.tokens.name,
    "first shard": lambda manifest: manifest.shards[0][0].name,
    "last shard": lambda manifest: manifest.shards[-1][-1].name,
    "checkpoint": lambda manifest: manifest.points[0].file.name,
    "part": lambda manifest: manifest.part.file.name,
    "last checkpoint": lambda manifest: manifest.points[-1].file.name,
}


def _flip(place):
    def damage(path):
        data = bytearray(path.read_bytes())
        data[int(place * (len(data) - 1))] ^= 1 << int(place * 997) % 8
        path.write_bytes(data)

    return damage


def _cut(keep):
    return lambda path: os.truncate(path, int(path.stat().st_size * keep))


def _link(path):
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def _pipe(path):
    path.unlink()
    os.mkfifo(path)


def _folder(path):
    path.unlink()
    path.mkdir()


def _zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def _longer(path):
    path.write_bytes(path.read_bytes() + b" ")


DAMAGE = {
    "cut to nothing": _cut(0),
    "cut in half": _cut(0.5),
    "cut by a byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "a byte longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "zeros": _zeros,
    "missing": lambda path: path.unlink(),
    "a link": _link,
    "a pipe": _pipe,
    "a folder": _folder,
    **{f"a bit flipped at {place}": _flip(place) for place in (0, 0.0011, 0.3, 0.77, 0.993, 1)},
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_damaged_files_are_refused(folder, file, damage):
    path = folder / FILES[file](load_manifest(folder))
    DAMAGE[damage](path)
    for work in (read_all, verify_text):
        refused(work, folder)
    if file != "manifest":
        refused(read_all, folder, "damaged" if damage != "a link" else path.name)
        # Saving makes it whole again, and keeps nothing of what is damaged.
        if damage != "a folder":
            save_text(folder, make_text(50, every=20, fork=1), IDENTITY, block=16)
            read_all(folder)
            verify_text(folder)


def test_every_bit_of_the_manifest_counts(folder):
    path = folder / MANIFEST
    data, manifest = path.read_bytes(), load_manifest(folder)
    for place in range(0, len(data), 7):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        try:
            assert read_manifest(bytes(changed)) == manifest  # a space became another one
        except ManifestError:
            continue


def test_shards_that_changed_places_are_found(folder):
    one, other = (folder / shard.name for shard in load_manifest(folder).shards[0][:2])
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    for work in (read_all, verify_text):
        refused(work, folder, "does not have the checksum")


def test_a_shard_that_is_cut_while_it_is_read(folder, monkeypatch):
    """Not a signal: a sentence."""
    real = os.readv

    def readv(descriptor, buffers):
        os.truncate(folder / load_manifest(folder).shards[0][0].name, 4100)
        return real(descriptor, buffers)

    found = open_text(folder, IDENTITY, TEXT.shape)
    monkeypatch.setattr(os, "readv", readv)
    with pytest.raises(InputError, match="4,100"):
        found.read(0, 0, 1)


def test_a_disk_that_cannot_be_read(folder, monkeypatch):
    def readv(descriptor, buffers):
        raise OSError(5, "Input/output error")

    found = open_text(folder, IDENTITY, TEXT.shape)
    monkeypatch.setattr(os, "readv", readv)
    for work in (lambda: found.read(0, 0, 1), lambda: verify_text(folder)):
        with pytest.raises(StorageError, match="cannot be read: Input/output error"):
            work()


# Manifests that somebody has made up: with a checksum that fits.


def _set(*path, to):
    def change(body):
        for key in path[:-1]:
            body = body[key]
        body[path[-1]] = to(body[path[-1]]) if callable(to) else to

    return change


def _file(name):
    return _set("shards", 0, 0, 0, to=name)


DEEP = json.loads("[" * 500 + "]" * 500)
HOSTILE = {
    "no session": lambda body: body.clear(),
    "an entry too many": lambda body: body.update(more=1),
    "an entry too few": lambda body: body.pop("points"),
    "a huge length": _set("length", to=2**39),
    "more tokens than there are numbers": _set("length", to=2**80),
    "one token more": _set("length", to=51),
    "one token less": _set("length", to=49),
    "no tokens": _set("length", to=0),
    "negative tokens": _set("length", to=-1),
    "tokens as a text": _set("length", to="50"),
    "tokens as a truth": _set("length", to=True),
    "tokens as a list": _set("length", to=[50]),
    "no block": _set("block", to=0),
    "a negative block": _set("block", to=-16),
    "a huge block": _set("block", to=2**40),
    "another block": _set("block", to=25),
    "a block of one": _set("block", to=1),
    "huge layers": _set("shape", 0, to=2**31),
    "a layer more": _set("shape", 0, to=3),
    "a layer less": _set("shape", 0, to=1),
    "negative heads": _set("shape", 1, to=-2),
    "huge heads": _set("shape", 1, to=65536),
    "huge head dimensions": _set("shape", 2, to=2**62),
    "heads and dimensions exchanged": lambda body: body["shape"].__setitem__(slice(1, 3), [4, 2]),
    "an unknown dtype": _set("shape", 3, to="F128"),
    "a dtype of another size": _set("shape", 3, to="F32"),
    "a dtype of the same size": _set("shape", 3, to="F16"),
    "a dtype as a number": _set("shape", 3, to=16),
    "a dtype as a list": _set("shape", 3, to=["BF16"]),
    "a shape of five": _set("shape", to=lambda shape: [*shape, 1]),
    "long as a number": _set("long", to=1),
    "no model": _set("model", to=None),
    "a hash that is none": _set("model", 2, to="x" * 32),
    "a name with lines": _set("model", 0, to="a\nb"),
    "a long name": _set("model", 0, to="a" * 10_000),
    "a time before all time": _set("saved", to=-1),
    "shards as a table": _set("shards", to={}),
    "no shards": _set("shards", to=[]),
    "a layer without shards": _set("shards", 0, to=[]),
    "a shard too many": _set("shards", 0, to=lambda shards: [*shards, shards[-1]]),
    "a shard twice": _set("shards", 0, to=lambda shards: [shards[0], shards[0], *shards[2:]]),
    "shards out of order": _set("shards", 0, to=lambda shards: [shards[1], shards[0], *shards[2:]]),
    "a layer's shards in another": lambda body: body["shards"].reverse(),
    "a shard as a text": _set("shards", 0, 0, to="kv"),
    "a name with ..": _file("../elsewhere/kv-0000-000000-0123456789abcdef.safetensors"),
    "an absolute name": _file("/etc/passwd"),
    "a name with a slash": _file("a/kv-0000-000000-0123456789abcdef.safetensors"),
    "a name with a zero byte": _file("kv-0000-000000-0123456789abcde\0.safetensors"),
    "an empty name": _file(""),
    "the manifest as a shard": _file(MANIFEST),
    "a name as a number": _file(7),
    "a name as a table": _file({}),
    "a file that is not there": _file("kv-0000-000000-0123456789abcdef.safetensors"),
    "a size of nothing": _set("shards", 0, 0, 1, to=0),
    "a negative size": _set("shards", 0, 0, 1, to=-5000),
    "a huge size": _set("shards", 0, 0, 1, to=2**62),
    "a size as a truth": _set("shards", 0, 0, 1, to=True),
    "another checksum": _set("shards", 0, 0, 2, to="0" * 32),
    "a checksum that is none": _set("shards", 0, 0, 2, to="0" * 31),
    "a checkpoint twice": _set("points", to=lambda points: [points[0], *points]),
    "checkpoints out of order": _set("points", to=lambda points: points[::-1]),
    "a checkpoint after the end": _set("points", 2, 0, to=51),
    "a negative checkpoint": _set("points", 0, 0, to=-1),
    "a huge part": _set("points", 0, 2, 0, 2, to=[2**40] * 8),
    "a part of other numbers": _set("points", 0, 2, 0, 2, to=lambda shape: [*shape, 2]),
    "a part in another shape": _set("points", 0, 2, -1, 2, to=lambda shape: shape[::-1]),
    "a negative dimension": _set("points", 0, 2, 0, 2, to=[-1, -8]),
    "too many dimensions": _set("points", 0, 2, 0, 2, to=[1] * 9),
    "too many parts": _set("points", 0, 2, to=lambda parts: parts * 500),
    "more read in part than there is": _set("part", 0, to=2**50),
    "no tokens read in part": _set("part", 0, to=0),
    "a chunk of nothing": _set("part", 1, to=0),
    "a layer before the first": _set("part", 2, to=-1),
    "chunks that are no number": _set("part", 3, to="2"),
    "nothing said of what was read in part": _set("part", to=None),
    "what was read in part of another length": _set("part", 0, to=8),
    "a file that is not that of what was read in part": _set("part", 4, 0, to="../../x"),
    "a huge tensor of what was read in part": _set("part", 5, 0, 2, to=[2**40] * 8),
    "a part twice": _set("points", 0, 2, to=lambda parts: [parts[0], *parts]),
    "a part with a path for a name": _set("points", 0, 2, 0, 0, to="../../x"),
    "a part of an unknown dtype": _set("points", 0, 2, 0, 1, to="P8"),
    "deeply nested": _set("shards", 0, 0, to=DEEP),
}


# What a look at names and sizes does not find.
LIKELY = {"another checksum", "a dtype of the same size", "a part in another shape", "heads and dimensions exchanged"}


def forge(folder, change):
    """The manifest after a change, with a checksum that fits."""
    whole = json.loads((folder / MANIFEST).read_bytes())
    change(whole["session"])
    whole["checksum"] = session_manifest._checksum(whole["session"])
    (folder / MANIFEST).write_text(json.dumps(whole))


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_manifests_are_refused(folder, kind, monkeypatch):
    forge(folder, lambda body: None)
    check_same(read_all(folder), TEXT)  # the forgery itself is good
    forge(folder, HOSTILE[kind])
    largest = [0]
    real = torch.empty

    def empty(*sizes, **options):
        made = real(*sizes, **options)
        largest[0] = max(largest[0], made.nbytes)
        return made

    monkeypatch.setattr(session_reader.torch, "empty", empty)
    tracemalloc.start()
    try:
        refused(read_all, folder)
        if kind != "a dtype of the same size":  # no byte of that is another; the model says what is wrong
            refused(verify_text, folder)
        assert tracemalloc.get_traced_memory()[1] < 12e6
    finally:
        tracemalloc.stop()
    assert largest[0] < 10_000
    shown = describe(folder)
    assert shown.manifest is None or kind in LIKELY
    remove_text(folder)
    assert not folder.exists()


RAW = {
    "nothing": b"",
    "no JSON": b"hello",
    "no UTF-8": b"\xff\xfe{}",
    "a list": b"[]",
    "a text": b'"offload-triforce session"',
    "null": b"null",
    "another format": b'{"format": "something else", "version": 1}',
    "no version": b'{"format": "offload-triforce session"}',
    "a version as a text": b'{"format": "offload-triforce session", "version": "1"}',
    "deeply nested": b"[" * 200_000 + b"]" * 200_000,
    "deeply nested inside": b'{"format": "offload-triforce session", "version": 1, "checksum": "0", "session": '
    + b"[" * 5_000
    + b"]" * 5_000
    + b"}",
    "a number without end": b'{"format": "offload-triforce session", "version": ' + b"9" * 100_000 + b"}",
    "not a number": b'{"format": "offload-triforce session", "version": NaN}',
    "a key twice": b'{"format": "x", "format": "offload-triforce session", "version": 1}',
}


@pytest.mark.parametrize("kind", RAW)
def test_what_is_no_manifest_is_refused(folder, kind):
    (folder / MANIFEST).write_bytes(RAW[kind])
    for work in (read_all, verify_text):
        refused(work, folder)


def test_a_huge_manifest_is_not_read(folder):
    os.truncate(folder / MANIFEST, MOST_BYTES + 1)
    refused(read_all, folder, "33,554,433 bytes")


def test_a_newer_version_says_so_and_is_not_replaced(folder):
    whole = json.loads((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).write_text(json.dumps(whole | {"version": 3}))
    before = sorted(os.listdir(folder))
    for work in (read_all, verify_text, lambda f: save_text(f, TEXT, IDENTITY)):
        refused(work, folder, "version 3", "only versions 1 and 2")
    assert sorted(os.listdir(folder)) == before


def test_a_header_that_is_not_what_belongs_there(folder):
    """With sums that fit: a shard whose own header claims another shape."""
    import xxhash

    manifest = load_manifest(folder)
    shard, entry = manifest.shards[0][0], manifest.kv(0)
    path = folder / shard.name
    other = (
        copy.replace(entry, shape=(2, 4, 16, 2))
        if hasattr(copy, "replace")
        else type(entry)("kv", "BF16", (2, 4, 16, 2))
    )
    header = header_of([entry])
    data = header_of([other]) + path.read_bytes()[len(header) :]
    path.write_bytes(data)
    forge(folder, _set("shards", 0, 0, 2, to=xxhash.xxh3_128(data).hexdigest()))
    for work in (read_all, verify_text):
        refused(work, folder, "another header")


def test_negative_ids_are_refused(folder):
    import xxhash

    path = folder / load_manifest(folder).tokens.name
    data = bytearray(path.read_bytes())
    data[-4:] = b"\xff" * 4
    path.write_bytes(data)
    forge(folder, _set("tokens", 2, to=xxhash.xxh3_128(bytes(data)).hexdigest()))
    refused(read_all, folder, "negative id")


def test_there_are_enough_of_them():
    assert len(FILES) * len(DAMAGE) >= 60
    assert len(HOSTILE) + len(RAW) >= 60
