"""Interrupted wherever it is, an answer leaves its engine and its model as they were."""

import ctypes
import random
import threading
import time

import pytest
import torch

from offload_triforce import TriForce
from offload_triforce.model.lock import locks_of
from tests.generation.turns import GREEDY, NEW, PROMPT, SMALL, Paused, all_at_once, assert_untouched
from tests.model.test_lock import in_thread, until
from tests.tiny import disturbed, greedy

pytestmark = pytest.mark.usefixtures("one_thread")


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
