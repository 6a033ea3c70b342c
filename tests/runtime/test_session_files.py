"""Sessions on disk: what is saved comes back to the last bit, and only the new is written."""

import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from offload_triforce.errors import InputError
from offload_triforce.runtime import session_reader
from offload_triforce.runtime.session_files import (
    verify_text,
)
from offload_triforce.runtime.session_folder import MANIFEST, load_manifest
from offload_triforce.runtime.shard_header import PAGE
from tests.runtime.saved_texts import BLOCK, bits, check_same, files, make_text, reopen, save


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


def test_memory_is_used_again_once_nobody_looks_at_it(folder, monkeypatch):
    """Counted: as many blocks as are read ahead, however many there are."""
    text, made = make_text(12 * BLOCK, layers=3), []
    save(folder, text)
    empty = session_reader.np.empty
    monkeypatch.setattr(session_reader.np, "empty", lambda *a, **k: made.append(a) or empty(*a, **k))
    found = reopen(folder, text)
    for layer in range(3):
        for start in range(0, 12 * BLOCK, BLOCK):
            part = found.read(layer, start, start + BLOCK)
            assert torch.equal(bits(part), bits(text.read(layer, start, start + BLOCK)))
    assert len(made) <= session_reader.AHEAD + 3  # one is looked at here, one was asked for, one is on its way


def test_what_somebody_looks_at_stays_as_it_is(folder):
    """Views of blocks that were read long ago, of parts of them, and of those that are read once more."""
    text = make_text(8 * BLOCK + 3, layers=3)
    save(folder, text)
    found, kept = reopen(folder, text), []
    for _ in range(2):
        for layer in range(3):
            for start in range(0, 8 * BLOCK, 5):
                kept.append((layer, start, found.read(layer, start, start + 5)[1:, :, 1:]))
    for layer, start, part in kept:
        assert torch.equal(bits(part), bits(text.read(layer, start, start + 5)[1:, :, 1:]))


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
