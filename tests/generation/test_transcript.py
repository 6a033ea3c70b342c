"""Messages on disk: they come back as they were, and what is no conversation is refused."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_triforce import InputError, StorageError
from offload_triforce.generation import transcript
from offload_triforce.generation.transcript import FILE, read_messages, write_messages

SAID = [{"role": "user", "content": "naïve?\n"}, {"role": "assistant", "content": "é", "reasoning_content": "hm"}]


def test_there_and_back(tmp_path):
    folder = tmp_path / "sessions" / "a"
    assert read_messages(folder) == []
    for messages in (SAID, [{"role": "system", "content": "S"}, *SAID, *SAID], []):
        write_messages(folder, messages, "a model")
        assert read_messages(folder) == messages
    assert os.listdir(folder) == [FILE]
    assert (folder / FILE).stat().st_mode & 0o077 == 0


def test_an_older_file_stays_whole_until_the_new_one_is(tmp_path, monkeypatch):
    write_messages(tmp_path, SAID, "m")
    monkeypatch.setattr(
        transcript.os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(StorageError, match="No space left on device"):
        write_messages(tmp_path, SAID + SAID, "m")
    assert read_messages(tmp_path) == SAID
    assert os.listdir(tmp_path) == [FILE]


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot be kept"):
        write_messages(tmp_path / "file" / "a", SAID, "m")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / FILE).mkdir()
    with pytest.raises(StorageError, match="cannot be read"):
        read_messages(tmp_path / "b")


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "the format None"),
        ('{"format": 2}', "the format 2"),
        ('{"format": 1}', "no list of messages"),
        ('{"format": 1, "messages": [1]}', "message 1 has no role"),
        ('{"format": 1, "messages": [{"role": "user", "content": 1}]}', "message 1 has no role or no text"),
        ('{"format": 1, "messages": [{"role": "tool", "content": "x"}]}', "message 1 has no role"),
        ('{"format": 1, "messages": [{"role": "user", "content": "x"}]}', "in turns"),
    ],
)
def test_what_is_no_conversation(kept, words, tmp_path):
    (tmp_path / FILE).write_text(kept)
    with pytest.raises(InputError, match=words) as error:
        read_messages(tmp_path)
    assert "\n" not in str(error.value)


def test_a_file_that_no_conversation_has(tmp_path, monkeypatch):
    write_messages(tmp_path, SAID, "m")
    monkeypatch.setattr(transcript, "MOST_BYTES", 10)
    with pytest.raises(InputError, match="which no conversation has"):
        read_messages(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.sampled_from(["user", "assistant", "system"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "reasoning_content"]), inner)
    ),
    max_leaves=12,
)


@given(JSON)
def test_whatever_is_there_is_read_or_refused(tmp_path_factory, messages):
    folder = tmp_path_factory.mktemp("kept")
    (folder / FILE).write_text(json.dumps({"format": 1, "messages": messages}))
    try:
        found = read_messages(folder)
    except InputError:
        return
    assert [message["role"] for message in found if message["role"] != "system"][1::2] == ["assistant"] * (
        len(found) // 2
    )
