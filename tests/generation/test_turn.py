"""Several threads, one engine or one model: every answer is right, whoever waits and whoever gives way."""

import threading

import pytest

from offload_triforce import BusyError, InputError, TriForce, triforce_generate
from offload_triforce.config import Settings
from offload_triforce.model.lock import locks_of
from tests.generation.turns import GREEDY, NEW, PROMPT, SMALL, Paused, all_at_once, assert_untouched
from tests.model.test_lock import in_thread, raise_in_thread, until
from tests.tiny import disturbed, greedy, prompt_ids

pytestmark = pytest.mark.usefixtures("one_thread")


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
