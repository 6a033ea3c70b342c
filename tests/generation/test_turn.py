"""Several threads, one engine or one model: every answer is right, whoever waits, leaves or is interrupted."""

import ctypes
import gc
import random
import threading
import time
import weakref

import pytest
import torch

from offload_triforce import BusyError, InputError, TriForce, triforce_generate
from offload_triforce.config import Settings
from offload_triforce.model.lock import locks_of
from tests.byte_tokenizer import byte_tokenizer
from tests.model.test_lock import in_thread, raise_in_thread, until
from tests.tiny import disturbed, greedy, prompt_ids, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT, NEW = prompt_ids(70), 24
GREEDY = {"max_new_tokens": NEW, "do_sample": False}
SMALL = {"budget": 48, "gamma": 4, "gamma1": 3, "chunk": 4, "sink": 4, "recent": 16, "tile": 16, "draft_cache": 64}
SMALL |= {"prefill_chunk": 32}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", seed=1, calm=True)


@pytest.fixture(scope="module")
def expected(model):
    return greedy(model, PROMPT, NEW)


@pytest.fixture
def engine(model):
    with TriForce(model, draft="self", reuse=False, **SMALL) as engine:  # each answer with its prefill
        yield engine


def all_at_once(*works):
    """Run all of them at the same time, each on a thread of its own: what each returned, or the error."""
    results, gate = [None] * len(works), threading.Barrier(len(works))

    def work(number):
        gate.wait(20)
        try:
            results[number] = works[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert not any(thread.is_alive() for thread in threads), "a deadlock"
    return results


def assert_untouched(model, expected):
    """The model as it was, and nobody's lock is left."""
    assert model.config._attn_implementation == vars(model.config)["_attn_implementation_internal"] == "sdpa"
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(lock.held() for lock in locks_of([model]))
    assert greedy(model, PROMPT, NEW) == expected
    raise_in_thread(lambda: assert_equal(greedy(model, PROMPT, 10), expected[:10]))


def assert_equal(one, other):
    assert one == other


# --- threads


@pytest.mark.parametrize("draft", ["ngram", "self"])
def test_two_engines_of_one_model(model, expected, draft):
    engines = [TriForce(model, draft=draft, context=150, **SMALL) for _ in range(2)]
    for _ in range(3):
        answers = all_at_once(
            *(lambda engine=engine: engine.generate(PROMPT, **GREEDY).token_ids for engine in engines)
        )
        assert answers == [expected] * 2
        assert_untouched(model, expected)


def test_one_engine_with_prompts_of_several_lengths(model, engine):
    """The caches are made anew for a longer prompt: not while another thread uses them."""
    prompts = [prompt_ids(tokens, seed=tokens) for tokens in (20, 150, 50, 100)]
    answers = all_at_once(
        *(lambda prompt=prompt: engine.generate(prompt, max_new_tokens=10, do_sample=False) for prompt in prompts)
    )
    assert [a.token_ids for a in answers] == [greedy(model, prompt, 10) for prompt in prompts]


def test_two_calls_of_generate(model, expected):
    settings = Settings(**SMALL)
    prompts = [PROMPT, prompt_ids(45)]

    def ask(prompt, draft):
        return model.generate(
            prompt, **GREEDY, custom_generate=triforce_generate, triforce_settings=settings, triforce_draft=draft
        )

    works = [lambda p=p, d=d: ask(p, d)[0, p.shape[1] :].tolist() for p in prompts for d in ("self", "ngram")]
    plain = [lambda p=p: greedy(model, p, NEW) for p in prompts]
    other = greedy(model, prompts[1], NEW)
    assert all_at_once(*works, *plain) == [expected, expected, other, other, expected, other]
    assert_untouched(model, expected)


def test_a_draft_of_two_engines(model, expected):
    draft, second = disturbed(model, 0.03), disturbed(model, 0.5, seed=4)
    engines = [TriForce(target, draft=draft, **SMALL) for target in (model, second)]
    answers = all_at_once(*(lambda engine=e: engine.generate(PROMPT, **GREEDY).token_ids for e in engines))
    assert answers == [expected, greedy(second, PROMPT, NEW)]
    assert_untouched(model, expected)
    assert_untouched(draft, greedy(draft, PROMPT, NEW))


def test_each_is_the_others_draft(model, expected):
    """Two threads that take the two models' locks, one in one role and one in the other."""
    other = disturbed(model, 0.03)
    pairs = [(model, other), (other, model), (model, model), (other, "self")]
    engines = [TriForce(target, draft=draft, **SMALL) for target, draft in pairs]
    answers = all_at_once(*(lambda engine=e: engine.generate(PROMPT, **GREEDY).token_ids for e in engines))
    wanted = greedy(other, PROMPT, NEW)
    assert answers == [expected, wanted, expected, wanted]


def test_engines_are_made_while_others_decode(model, engine, expected):
    """The probe and the draft's trial run the model too."""

    def make():
        return [TriForce(model, draft="self", **SMALL).layout for _ in range(4)]

    answer, layouts = all_at_once(lambda: engine.generate(PROMPT, **GREEDY).token_ids, make)
    assert answer == expected
    assert layouts == [engine.layout] * 4


# --- who waits, and who gives way


class Paused:
    """An answer of another thread, which has read one piece of it and then waits for ``go``."""

    def __init__(self, engine):
        self.go, self.begun = threading.Event(), threading.Event()
        self.tokens, self.error = [], None
        self.thread, _ = in_thread(lambda: self._read(engine))
        assert self.begun.wait(20)

    def _read(self, engine):
        try:
            with engine.stream(PROMPT, **GREEDY) as stream:
                for new in stream._tokens:
                    self.tokens += new
                    self.begun.set()
                    self.go.wait(20)
        except InputError as error:
            self.error = error

    def end(self):
        self.go.set()
        self.thread.join(20)
        assert not self.thread.is_alive()


def test_another_thread_waits_until_the_answer_is_over(engine, expected):
    paused = Paused(engine)
    with pytest.raises(BusyError, match=r"^this engine is busy with another answer; call without wait=False to wait"):
        engine.generate(PROMPT, **GREEDY, wait=False)
    with pytest.raises(BusyError):
        engine.stream(PROMPT, **GREEDY, wait=False)
    second, answers = in_thread(lambda: engine.generate(PROMPT, **GREEDY).token_ids)
    until(lambda: len(engine._turns._queue) == 2)
    assert not answers
    paused.end()
    second.join(20)
    assert paused.tokens == answers[0] == expected
    assert engine.generate(PROMPT, **GREEDY, wait=False).token_ids == expected


def test_a_paused_answer_does_not_keep_other_engines_waiting(model, engine, expected):
    """Between two pieces it holds its own caches, and no model."""
    paused = Paused(engine)
    with TriForce(model, draft="self", **SMALL) as other:
        assert other.generate(PROMPT, **GREEDY, wait=False).token_ids == expected
    assert greedy(model, PROMPT, NEW) == expected
    paused.end()
    assert paused.tokens == expected


def test_a_model_that_is_in_the_middle_of_another_engines_step(model, engine, expected):
    """Who does not wait is told; who does gets the model when the step is over."""
    inside, go = threading.Event(), threading.Event()

    def progress(done, total):
        inside.set()
        assert go.wait(20)

    first, _ = in_thread(lambda: engine.generate(PROMPT, **GREEDY, progress=progress))
    assert inside.wait(20)
    with pytest.raises(BusyError, match="at work on this LlamaForCausalLM"):
        model.generate(PROMPT, max_new_tokens=2, custom_generate=triforce_generate, triforce_wait=False)
    second, answers = in_thread(lambda: TriForce(model, draft="self", **SMALL).generate(PROMPT, **GREEDY).token_ids)
    until(lambda: len(locks_of([model])[0]._queue) == 2)
    go.set()
    for thread in (first, second):
        thread.join(20)
    assert answers == [expected]


def test_two_streams_of_two_engines_in_one_thread(model, expected):
    """They may take turns token by token."""
    with TriForce(model, draft="self", **SMALL) as one, TriForce(model, draft="ngram", **SMALL) as other:
        streams = [e.stream(PROMPT, **GREEDY) for e in (one, other)]
        left = [s._tokens for s in streams]
        answers = [[], []]
        while any(left):
            for number, tokens in enumerate(left):
                if tokens is not None:
                    new = next(tokens, None)
                    left[number] = None if new is None else tokens
                    answers[number] += new or []
    assert answers == [expected, expected]


def test_a_newer_answer_of_the_same_thread_takes_the_caches(engine, expected):
    older = engine.stream(PROMPT, **GREEDY)
    next(older._tokens)
    assert engine.generate(PROMPT, **GREEDY).token_ids == expected
    with pytest.raises(InputError, match="given up: its engine has been closed or asked for another since"):
        next(older._tokens)


def test_an_answer_that_went_through_other_hands_is_waited_for(engine, expected):
    """Two requests may share the threads of a pool: none is given up for the other as long as its reader lives."""
    paused = Paused(engine)
    with pytest.raises(BusyError):
        engine.generate(PROMPT, **GREEDY, wait=False)
    paused.end()
    # One whose only reader has ended without finishing it, and that somebody still refers to.
    streams = []

    def read():
        streams.append(engine.stream(PROMPT, **GREEDY))
        next(streams[0]._tokens)

    in_thread(read)[0].join(20)
    assert engine.generate(PROMPT, **GREEDY).token_ids == expected
    with pytest.raises(InputError, match="given up"):
        next(streams[0]._tokens)


def test_an_answer_may_be_read_by_one_thread_after_the_other(engine, expected):
    stream = engine.stream(PROMPT, **GREEDY)
    tokens = []
    for _ in range(NEW):
        raise_in_thread(lambda: tokens.extend(next(stream._tokens, [])))
    assert tokens == expected


def test_a_callback_cannot_wait_for_its_own_answer(model, engine, expected):
    errors = []

    def asks(work):
        def progress(done, total):
            if done == 1:
                with pytest.raises(BusyError) as error:
                    work()
                errors.append(str(error.value))

        return progress

    for work in (lambda: engine.generate(PROMPT, **GREEDY), engine.close):
        assert engine.generate(PROMPT, **GREEDY, progress=asks(work)).token_ids == expected
    assert errors == [
        "this engine is in the middle of an answer, and a callback inside of a step cannot wait for it",
        "this engine is in the middle of an answer, and cannot be closed by one of its callbacks",
    ]


def test_a_callback_may_run_another_engine(model, engine, expected):
    seen = []
    with TriForce(model, draft="ngram", **SMALL) as other:
        few = {"max_new_tokens": 3, "do_sample": False}
        progress = lambda done, total: seen.append(other.generate(PROMPT, **few).token_ids)  # noqa: E731
        assert engine.generate(PROMPT, **GREEDY, progress=progress).token_ids == expected
    assert seen == [expected[:3]] * 9


# --- who leaves


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


# --- interruptions


def interrupt_by_exception(target, error=KeyboardInterrupt):
    """As a signal does in the main thread: between two bytecodes, wherever it is."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(target.ident), ctypes.py_object(error))


def test_interrupted_at_random_moments(model, expected):
    """Of making an engine, of the prefill, and of decoding; in the thread that works, or while it waits its turn."""
    draft = disturbed(model, 0.03)
    wanted, chance, interrupted = greedy(draft, PROMPT, NEW), random.Random(0), 0
    with TriForce(model, draft=draft, **SMALL) as engine:
        engine.generate(PROMPT, **GREEDY)
        for _ in range(25):
            errors, begun = [], threading.Event()

            def work(begun=begun, errors=errors):
                begun.set()
                try:
                    TriForce(model, draft="self", **SMALL)
                    for _ in range(5):
                        engine.generate(PROMPT, **GREEDY)
                except KeyboardInterrupt as error:
                    errors.append(error)  # and with it, all frames that it went through

            thread = threading.Thread(target=work, daemon=True)
            thread.start()
            begun.wait(20)
            time.sleep(chance.random() * 0.4)
            interrupt_by_exception(thread)
            thread.join(60)
            assert not thread.is_alive()
            interrupted += len(errors)
            assert not engine._turns.held()
            assert not any(lock.held() for lock in locks_of([model, draft]))
            for one in (model, draft):
                assert not any("forward" in vars(module) for module in one.modules())
            assert greedy(model, PROMPT, 3) == expected[:3]
        assert interrupted > 12
        assert engine.generate(PROMPT, **GREEDY).token_ids == expected
    assert_untouched(model, expected)
    assert_untouched(draft, wanted)


PLACES = ["progress", "processor", "criterion", "layer", "norm", "drafting"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("calls", [0, 1, 5])
def test_interrupted_in_every_place(model, engine, expected, place, calls):
    """The interruption is kept, with its frames, while everything is looked at; and the other thread goes on."""
    count, defaults = 0, model.generation_config

    def strike(*_, **__):
        nonlocal count
        count += 1
        if count > calls:
            raise KeyboardInterrupt

    def processor(ids, scores):
        strike()
        return scores

    def criterion(ids, scores, **_):
        strike()
        return torch.zeros(1, dtype=torch.bool)

    options, handle = dict(GREEDY), None
    if place == "progress":
        options["progress"] = strike
    elif place == "processor":
        options["logits_processor"] = [processor]
    elif place == "criterion":
        options["stopping_criteria"] = [criterion]
    else:
        part = {"layer": "layers.1.self_attn", "norm": "norm", "drafting": "layers.2.mlp"}[place]
        handle = model.model.get_submodule(part).register_forward_hook(strike)
    try:
        with pytest.raises(KeyboardInterrupt) as kept:
            engine.generate(PROMPT, **options)
    finally:
        if handle is not None:
            handle.remove()
    assert model.generation_config is defaults
    assert_untouched(model, expected)
    answers = all_at_once(lambda: engine.generate(PROMPT, **GREEDY, wait=False).token_ids)
    assert answers == [expected]
    assert kept.value is not None


def test_interrupted_while_it_waits(model, engine, expected):
    """It leaves the queue, and the one behind it gets its turn."""
    paused = Paused(engine)
    caught = []

    def waits():
        try:
            engine.generate(PROMPT, **GREEDY)
        except KeyboardInterrupt as error:
            caught.append(error)

    waiting, _ = in_thread(waits)
    until(lambda: len(engine._turns._queue) == 2)
    last, answers = in_thread(lambda: engine.generate(PROMPT, **GREEDY).token_ids)
    until(lambda: len(engine._turns._queue) == 3)
    interrupt_by_exception(waiting)
    waiting.join(20)
    assert len(caught) == 1
    assert len(engine._turns._queue) == 2
    paused.end()
    last.join(20)
    assert answers == [expected]
