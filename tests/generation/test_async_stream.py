"""``astream`` and ``agenerate``: the event loop goes on, tasks wait in turn, and a cancelled one stops decoding."""

import asyncio
import contextvars
import gc
import threading
import time

import pytest
import torch

from offload_triforce import BusyError, InputError, TriForce
from tests.byte_tokenizer import byte_tokenizer
from tests.tiny import greedy, prompt_ids, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT, NEW = prompt_ids(70), 24
GREEDY = {"max_new_tokens": NEW, "do_sample": False}
SMALL = {"budget": 48, "gamma": 4, "gamma1": 3, "chunk": 4, "sink": 4, "recent": 16, "tile": 16, "draft_cache": 64}
SMALL |= {"prefill_chunk": 16}
STEPS = 15  # chunks of the prompt through layers


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", seed=1, calm=True, vocab_size=259)


@pytest.fixture(scope="module")
def expected(model):
    return greedy(model, PROMPT, NEW)


@pytest.fixture
def engine(model):
    with TriForce(model, byte_tokenizer(), draft="self", reuse=False, **SMALL) as engine:  # each with its prefill
        yield engine


def run(coroutine):
    """In a loop of its own; it fails rather than hang."""
    return asyncio.run(asyncio.wait_for(coroutine, 60))


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


def test_the_same_pieces_and_the_same_result(engine, expected):
    async def read():
        stream = engine.astream(PROMPT, **GREEDY)
        pieces = [piece async for piece in stream]
        assert [piece async for piece in stream] == []  # it stays at its end
        return pieces, stream.result

    pieces, result = run(read())
    plain = engine.stream(PROMPT, **GREEDY)
    assert "".join(pieces) == "".join(plain) == result.text
    assert len(pieces) > 3
    assert result.token_ids == plain.result.token_ids == expected
    assert not result.stats.interrupted


def test_generate(engine, expected):
    assert run(engine.agenerate(PROMPT, **GREEDY)).token_ids == expected


def test_the_loop_goes_on_meanwhile(engine, expected):
    """A decoding that is held up in a callback does not hold up the loop."""
    go, told = threading.Event(), []

    async def both():
        task = asyncio.create_task(engine.agenerate(PROMPT, **GREEDY, progress=lambda *_: told.append(go.wait(20))))
        for _ in range(50):
            await asyncio.sleep(0)
        assert not task.done()
        go.set()
        return (await task).token_ids

    assert run(both()) == expected
    assert told == [True] * STEPS


def test_many_tasks_wait_in_turn(model, engine):
    prompts = [prompt_ids(tokens, seed=tokens) for tokens in (20, 75, 40, 60, 33)]

    async def ask():
        return await asyncio.gather(*(engine.agenerate(p, max_new_tokens=8, do_sample=False) for p in prompts))

    assert [answer.token_ids for answer in run(ask())] == [greedy(model, prompt, 8) for prompt in prompts]


def test_two_streams_of_one_engine_in_one_task(engine, expected):
    """The second is decoded when the first is through, whether or not that has been read."""

    async def read():
        one, other = engine.astream(PROMPT, **GREEDY), engine.astream(PROMPT, **GREEDY)
        await anext(one)
        await anext(other)
        for stream in (one, other):
            async for _ in stream:
                pass
        return [stream.result.token_ids for stream in (one, other)]

    assert run(read()) == [expected, expected]


def test_who_does_not_want_to_wait(engine, expected):
    go = threading.Event()

    async def ask():
        first = asyncio.create_task(engine.agenerate(PROMPT, **GREEDY, progress=lambda *_: go.wait(20)))
        await until(engine._turns.held)
        with pytest.raises(BusyError, match="busy with another answer"):
            await engine.agenerate(PROMPT, **GREEDY, wait=False)
        go.set()
        return (await first).token_ids

    assert run(ask()) == expected


@pytest.mark.parametrize("moment", ["prefill", "decoding"])
def test_a_cancelled_task_stops_decoding_and_frees_the_engine(engine, expected, moment):
    """When the task is over, the engine is free: nothing is left to wait for."""
    steps, all_steps = [], []

    def count(ids, scores):
        all_steps.append(None)
        return scores

    engine.generate(PROMPT, **GREEDY, logits_processor=[count])

    async def cancel():
        reached, loop = asyncio.Event(), asyncio.get_running_loop()

        def tell(*_):
            steps.append(None)
            loop.call_soon_threadsafe(reached.set)
            time.sleep(0.005)

        def processor(ids, scores):
            tell()
            return scores

        how = {"progress": tell} if moment == "prefill" else {"logits_processor": [processor]}
        task = asyncio.create_task(engine.agenerate(PROMPT, **GREEDY, **how))
        await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not engine._turns.held()
        seen = len(steps)
        await asyncio.sleep(0.05)
        assert len(steps) == seen
        return seen

    assert run(cancel()) < (STEPS if moment == "prefill" else len(all_steps) / 2)
    assert engine.generate(PROMPT, **GREEDY, wait=False).token_ids == expected


def test_a_task_that_is_cancelled_while_it_waits(engine, expected):
    """It leaves the queue at once; the one behind it gets its turn."""
    go = threading.Event()

    async def ask():
        first = asyncio.create_task(engine.agenerate(PROMPT, **GREEDY, progress=lambda *_: go.wait(20)))
        await until(engine._turns.held)
        second = asyncio.create_task(engine.agenerate(PROMPT, **GREEDY))
        await until(lambda: len(engine._turns._queue) == 2)
        third = asyncio.create_task(engine.agenerate(PROMPT, **GREEDY))
        await until(lambda: len(engine._turns._queue) == 3)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        assert len(engine._turns._queue) == 2
        go.set()
        return [(await task).token_ids for task in (first, third)]

    assert run(ask()) == [expected, expected]


def leaving_by_closing(stream):
    return stream.aclose()


async def leaving_by_dropping(stream):
    del stream


@pytest.mark.parametrize("leave", [leaving_by_closing, leaving_by_dropping])
def test_a_reader_that_leaves(engine, expected, leave):
    """The decoding ends early, and not by reaching its end."""
    steps = []

    def slow(ids, scores):
        steps.append(None)
        time.sleep(0.002)
        return scores

    engine.generate(PROMPT, **GREEDY, logits_processor=[slow])
    all_steps = len(steps)
    steps.clear()

    async def read():
        stream = engine.astream(PROMPT, **GREEDY, logits_processor=[slow])
        assert await anext(stream)
        leaving = leave(stream)
        del stream
        await leaving
        await until(lambda: not engine._turns.held())
        assert len(steps) < all_steps / 2
        return await engine.agenerate(PROMPT, **GREEDY, wait=False)

    gc.disable()
    try:
        assert run(read()).token_ids == expected
    finally:
        gc.enable()


def test_break_out_of_the_loop(engine, expected):
    async def read():
        async for piece in engine.astream(PROMPT, **GREEDY):
            assert piece
            break
        return await engine.agenerate(PROMPT, **GREEDY)

    assert run(read()).token_ids == expected


def test_a_stream_that_is_never_read_holds_nothing(engine, expected):
    async def ask():
        stream = engine.astream(PROMPT, **GREEDY)
        with pytest.raises(InputError, match="no result before"):
            stream.result  # noqa: B018
        await stream.aclose()
        assert [piece async for piece in stream] == []
        return await engine.agenerate(PROMPT, **GREEDY, wait=False)

    assert run(ask()).token_ids == expected


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_new_tokens": 0}, InputError, "at least 1"),
        ({"max_new_tokens": 10**6}, InputError, "exceed the model's positions"),
        ({**GREEDY, "progress": lambda *_: 1 / 0}, ZeroDivisionError, "division"),
    ],
)
def test_errors_arrive_where_the_answer_is_read(engine, expected, options, error, words):
    async def ask():
        stream = engine.astream(PROMPT, **options)
        with pytest.raises(error, match=words):
            await anext(stream)
        assert not engine._turns.held()
        return await engine.agenerate(PROMPT, **GREEDY, wait=False)

    assert run(ask()).token_ids == expected


def test_a_loop_that_ends_while_a_thread_decodes(engine, expected):
    """Nobody listens any more: the thread ends by itself."""
    loop = asyncio.new_event_loop()
    stream = engine.astream(PROMPT, **GREEDY)
    loop.run_until_complete(anext(stream))
    loop.close()
    deadline = time.monotonic() + 20
    while engine._turns.held():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert engine.generate(PROMPT, **GREEDY, wait=False).token_ids == expected


def test_modes_of_the_task_are_its_own(engine, expected):
    """torch's modes belong to threads, context variables go along with the task."""
    variable, seen = contextvars.ContextVar("variable", default=None), []

    async def ask():
        variable.set("of the task")
        with torch.inference_mode():
            answer = await engine.agenerate(PROMPT, **GREEDY, progress=lambda *_: seen.append(variable.get()))
            assert torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
        return answer

    assert run(ask()).token_ids == expected
    assert set(seen) == {"of the task"}
