"""Whoever leaves an answer, in whatever way, frees its engine for others."""

import gc
import threading
import weakref

import pytest

from offload_triforce import BusyError, InputError, TriForce
from tests.byte_tokenizer import byte_tokenizer
from tests.generation.turns import GREEDY, NEW, PROMPT, SMALL, Paused, assert_untouched
from tests.model.test_lock import in_thread, raise_in_thread, until
from tests.tiny import greedy, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


def leave_by_break(engine):
    for piece in engine.stream(PROMPT, **GREEDY):
        assert piece
        break
    else:
        pytest.fail("it ended before the first piece")


def leave_by_closing(engine):
    stream = engine.stream(PROMPT, **GREEDY)
    next(stream._tokens)
    stream.close()
    assert stream.result.token_ids == []  # read past it


def leave_by_with(engine):
    with engine.stream(PROMPT, **GREEDY) as stream:
        next(stream._tokens)
    return stream


def leave_without_beginning(engine):
    engine.stream(PROMPT, **GREEDY)


def close_without_beginning(engine):
    stream = engine.stream(PROMPT, **GREEDY)
    stream.close()
    return stream


def leave_by_an_error(engine):
    with pytest.raises(ZeroDivisionError):
        engine.generate(PROMPT, **GREEDY, progress=lambda *_: 1 / 0)


def leave_by_a_refusal(engine):
    with pytest.raises(InputError):
        engine.generate(PROMPT, max_new_tokens=10**6)


LEAVING = [leave_by_break, leave_by_closing, leave_by_with, leave_without_beginning, close_without_beginning]
LEAVING += [leave_by_an_error, leave_by_a_refusal]


@pytest.mark.parametrize("leave", LEAVING)
def test_who_leaves_an_answer_frees_the_engine(leave):
    """At once, without the garbage collector's help: it is another thread that does not wait then."""
    model = tiny_model("llama", seed=1, calm=True, vocab_size=259)
    expected, kept = greedy(model, PROMPT, NEW), []
    with TriForce(model, byte_tokenizer(), draft="ngram", **SMALL) as engine:
        gc.disable()
        try:
            raise_in_thread(lambda: kept.append(leave(engine)))
            assert not engine._turns.held()
        finally:
            gc.enable()
        assert engine.generate(PROMPT, **GREEDY, wait=False).token_ids == expected
    assert_untouched(model, expected)


def test_a_stream_dies_with_its_last_reader(model, engine):
    """It is in no cycle, begun or not."""
    gc.disable()
    try:
        for begun in (False, True):
            stream = engine.stream(PROMPT, **GREEDY)
            if begun:
                list(stream)
            alive = weakref.ref(stream)
            del stream
            assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("moment", ["prefill", "decoding"])
def test_cancelled_from_another_thread(engine, expected, moment):
    """Quietly, at the next chunk or pass; what has been said counts."""
    steps, streams = [], []

    def progress(done, total):
        steps.append(done)
        if moment == "prefill":
            raise_in_thread(streams[0].cancel)

    streams.append(engine.stream(PROMPT, **GREEDY, progress=progress))
    tokens = []
    for new in streams[0]._tokens:
        tokens += new
        raise_in_thread(streams[0].cancel)
    if moment == "prefill":
        assert (steps, tokens) == ([1], [])
    else:
        assert 0 < len(tokens) < NEW
        assert tokens == expected[: len(tokens)]
    assert streams[0].stats.interrupted
    assert streams[0].stats.new_tokens == len(tokens)
    assert engine.generate(PROMPT, **GREEDY, wait=False).token_ids == expected


def test_a_cancelled_answer_that_nobody_reads_on_gives_way(engine, expected):
    """Its reader, should it come back, is told that it has ended."""
    streams, begun, go = [], threading.Event(), threading.Event()

    def read():
        streams.append(engine.stream(PROMPT, **GREEDY))
        first = next(streams[0]._tokens)
        begun.set()
        assert go.wait(20)
        return first + [token for tokens in streams[0]._tokens for token in tokens]

    reader, read_tokens = in_thread(read)
    assert begun.wait(20)
    with pytest.raises(BusyError):
        engine.generate(PROMPT, **GREEDY, wait=False)
    streams[0].cancel()
    assert engine.generate(PROMPT, **GREEDY, wait=False).token_ids == expected
    go.set()
    reader.join(20)
    assert 0 < len(read_tokens[0]) < NEW
    assert streams[0].stats.interrupted


def test_closing_ends_the_answer_of_another_thread(engine, expected):
    """It waits for no more than the step that is running; those who wait for their turn get it afterwards."""
    paused = Paused(engine)
    second, answers = in_thread(lambda: engine.generate(PROMPT, **GREEDY).token_ids)
    until(lambda: len(engine._turns._queue) == 2)
    engine.close()
    paused.end()
    assert "given up" in str(paused.error)
    assert 0 < len(paused.tokens) < NEW
    second.join(20)
    assert answers == [expected]
