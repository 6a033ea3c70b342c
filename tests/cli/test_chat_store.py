"""Conversations on disk: who goes on with one does not replace what somebody else has said in it."""

import os

import pytest

from offload_triforce import BusyError, StorageError
from offload_triforce.cli import kept_session
from offload_triforce.cli.chat_store import Store
from offload_triforce.cli.kept_session import KeptSession
from offload_triforce.generation.dialogue import Dialogue
from offload_triforce.generation.transcript import read_messages
from offload_triforce.runtime import session_folder
from tests.generation.talk import ScriptedSession, scripted_engine

ONE, OTHER = ([{"role": "user", "content": word}, {"role": "assistant", "content": word}] for word in ("a", "b"))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFLOAD_TRIFORCE_CACHE", str(tmp_path))
    return tmp_path / "sessions"


def open_store(name):
    engine = scripted_engine()
    engine.session = lambda: ScriptedSession(engine.tokenizer)
    store = Store(engine, "a model")
    store.open(name, Dialogue(engine, store.session, seed=1), new=True)
    return store


@pytest.mark.parametrize("begun", [True, False])
def test_two_that_go_on_with_one_conversation(folder, begun):
    """The second to say something is told; and keeps its own under another name."""
    if begun:
        open_store("talk").keep(ONE)
    first, second = open_store("talk"), open_store("talk")
    first.keep(ONE + ONE)
    first.keep(ONE + OTHER)
    for save in (lambda: second.keep(OTHER), lambda: second.save(None, OTHER)):
        with pytest.raises(BusyError, match="talk has been gone on with somewhere else, and is not replaced"):
            save()
    assert read_messages(folder / "talk") == ONE + OTHER
    second.save("mine", OTHER)
    second.keep(OTHER + OTHER)
    assert read_messages(folder / "mine") == OTHER + OTHER
    first.keep(ONE)
    assert read_messages(folder / "talk") == ONE


def test_one_that_was_removed_meanwhile_is_kept_anew(folder):
    store = open_store("talk")
    store.keep(ONE)
    os.unlink(folder / "talk" / "messages.json")
    store.keep(ONE + OTHER)
    assert read_messages(folder / "talk") == ONE + OTHER


def test_a_name_that_could_not_be_taken_leaves_the_old_one(folder):
    store = open_store("talk")
    store.keep(ONE)
    (folder / "file").write_text("mine")
    with pytest.raises(StorageError, match="cannot be kept"):
        store.save(f"{folder}/file/x", ONE)
    store.keep(ONE + OTHER)
    assert read_messages(folder / "talk") == ONE + OTHER


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_may_not_be_written_to_is_refused_before_anything_is_read(folder, monkeypatch, there):
    """The superuser may write anywhere: so it is the system's answer that is changed."""
    asked = folder / "report"
    (asked if there else folder).mkdir(parents=True)
    monkeypatch.setattr(session_folder.os, "access", lambda path, mode: path not in (asked, folder))
    with pytest.raises(StorageError, match=f"nothing can be saved in {asked}: .* may not be written to"):
        KeptSession("report")
    assert kept_session.session_path("report") == asked
