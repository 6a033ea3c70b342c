"""``generate --session NAME``: begun, gone on with, refused for another model, saved when interrupted."""

import json

import pytest

from offload_triforce.cli.loading import Loading
from offload_triforce.generation.answer import TextStream
from offload_triforce.runtime.session_check import verify_text
from offload_triforce.runtime.session_folder import load_manifest, session_path
from offload_triforce.scheduler.states import DeviceStates
from tests.byte_tokenizer import save_tiny_llama
from tests.cli.calling import FEW, call, check_mistake, generate, refused


@pytest.fixture(autouse=True)
def empty(monkeypatch, tmp_path):
    monkeypatch.setenv("OFFLOAD_TRIFORCE_CACHE", str(tmp_path / "cache"))


def asked(model, book, question, *options):
    done = generate("--model", model, "--prompt-file", book, "--ask", question, "--raw", *FEW, *options)
    assert done.exit_code == 0, done.output
    return done


def test_begun_and_gone_on_with(model, book, monkeypatch):
    first = asked(model, book, "Who?", "--session", "book", "--json")
    assert "saved " in first.stderr
    assert json.loads(first.stdout)["reused_tokens"] == 0
    held = load_manifest(session_path("book")).length
    read = []
    monkeypatch.setattr(Loading, "__call__", lambda loading, done, total: read.append((done, total)))
    wanted = json.loads(asked(model, book, "When?", "--json").stdout)
    second = asked(model, book, "When?", "--session", "book", "--json")
    assert f"going on with {session_path('book')}: {held:,} tokens" in " ".join(second.stderr.split())
    assert read
    assert read[-1][0] == read[-1][1]
    found = json.loads(second.stdout)
    assert found["token_ids"] == wanted["token_ids"]
    assert found["reused_tokens"] > 500  # the book
    verify_text(session_path("book"))


def test_a_path(model, book, tmp_path):
    asked(model, book, "Who?", "--session", str(tmp_path / "kept"))
    verify_text(tmp_path / "kept")


def test_refused_before_the_work(model, book, tmp_path):
    refused(
        "generate", "--model", "nowhere", "--prompt", "x", "--session", "a b", words="cannot be the name of a session"
    )
    asked(model, book, "Who?", "--session", "book")
    other = save_tiny_llama(tmp_path / "other", initializer_range=0.3)
    mistaken = generate("--model", other, "--prompt", "x", "--session", "book", *FEW)
    check_mistake(mistaken, "other weights")
    (session_path("book") / "session.json").write_text("{")
    refused("generate", "--model", "nowhere", "--prompt", "x", "--session", "book", words="damaged")


def test_ctrl_c_saves_what_there_is(model, book, monkeypatch):
    real = TextStream.__next__
    pieces = []

    def interrupted(stream):
        pieces.append(None)
        if len(pieces) > 1:
            raise KeyboardInterrupt
        return real(stream)

    with monkeypatch.context() as patched:
        patched.setattr(TextStream, "__next__", interrupted)
        done = generate("--model", model, "--prompt-file", book, "--raw", "--session", "book", *FEW)
    assert done.exit_code == 130
    verify_text(session_path("book"))
    assert load_manifest(session_path("book")).length > 500
    again = json.loads(asked(model, book, "Who?", "--session", "book", "--json").stdout)
    assert again["reused_tokens"] > 500


def test_ctrl_c_in_a_first_prefill_loses_nothing(model, book, monkeypatch):
    """Of the only group, one layer has read its tokens: the next process goes on with the second."""
    take, taken = DeviceStates.take, []

    def interrupted(states, index):
        taken.append(index)
        if len(taken) == 2:
            raise KeyboardInterrupt
        return take(states, index)

    with monkeypatch.context() as patched:
        patched.setattr(DeviceStates, "take", interrupted)
        done = generate("--model", model, "--prompt-file", book, "--raw", "--session", "book", *FEW)
    assert done.exit_code == 130
    assert "0 tokens, and " in done.stderr
    manifest = verify_text(session_path("book"))
    assert manifest.length == 0
    assert (manifest.part.layer, manifest.part.done) == (1, 0)
    assert f"and {manifest.part.tokens:,} in part" in call("sessions", "show", "book").stdout
    with monkeypatch.context() as patched:
        patched.setattr(DeviceStates, "take", interrupted)
        again = generate("--model", model, "--prompt-file", book, "--raw", "--session", "book", "--json", *FEW)
    found = json.loads(again.stdout)
    assert len(taken) == 3
    assert found["reused_tokens"] == 0
    assert found["resumed_tokens"] > 200
    fresh = generate("--model", model, "--prompt-file", book, "--raw", "--json", *FEW)
    assert found["token_ids"] == json.loads(fresh.stdout)["token_ids"]
    assert load_manifest(session_path("book")).part is None


def test_an_answer_is_not_lost_where_the_disk_is_full(model, book, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("offload_triforce.runtime.shard_writer.os.fsync", full)
    done = generate("--model", model, "--prompt-file", book, "--raw", "--session", "book", *FEW)
    assert done.exit_code == 2
    assert len(done.stdout) > 0
    assert "is full" in done.stderr
