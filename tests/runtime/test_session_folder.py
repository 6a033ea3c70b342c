"""Whose a saved session is: another model, another process, another folder; listing and removing."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from offload_triforce.errors import BusyError, InputError
from offload_triforce.runtime.held import HeldText, KVShape
from offload_triforce.runtime.session_files import (
    describe,
    list_texts,
    open_text,
    remove_text,
)
from offload_triforce.runtime.session_folder import LOCK, MANIFEST, load_manifest, locked
from tests.runtime.saved_texts import BLOCK, IDENTITY, bits, check_same, files, make_text, reopen, save


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


def test_a_session_that_somebody_else_saves_anew_while_it_is_read(folder):
    """It is not damaged; and what was read of it stays as it was."""
    text, other = make_text(8 * BLOCK), make_text(8 * BLOCK, fork=1)
    save(folder, text)
    found = reopen(folder, text)
    first = found.read(0, 0, BLOCK)
    save(folder, other)
    with pytest.raises(BusyError, match="saved anew by somebody else since it was opened here; load it again"):
        found.read(1, 7 * BLOCK, 8 * BLOCK)
    assert torch.equal(bits(first), bits(text.read(0, 0, BLOCK)))
    check_same(reopen(folder, text), other)
