"""Fair locks, the one of each model, and putting right whatever an interruption leaves."""

import copy
import gc
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_triforce import BusyError
from offload_triforce.model import lock as lock_module
from offload_triforce.model.lock import (
    FairLock,
    Hold,
    Holder,
    awaited,
    check_idle,
    do_and_undo,
    guard,
    locks_of,
    may_wait,
)
from tests.tiny import tiny_model


def in_thread(work):
    """Run ``work`` on a thread of its own; its result is in the list that comes back once it has ended."""
    results = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    return thread, results


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.001)


# --- the lock itself


def test_the_lock_goes_to_those_who_wait_in_their_order():
    lock, first, order = FairLock(), Holder(), []
    assert lock.acquire(first)
    threads = []
    for number in range(6):
        holder = Holder()

        def work(number=number, holder=holder):
            lock.acquire(holder)
            order.append(number)
            lock.release(holder)

        threads.append(in_thread(work)[0])
        until(lambda count=number + 2: len(lock._queue) == count)
    lock.release(first)
    for thread in threads:
        thread.join(20)
    assert order == list(range(6))
    assert not lock.held()


def test_nobody_waits_who_does_not_want_to():
    lock, holder, other = FairLock(), Holder(), Holder()
    assert lock.acquire(holder)
    assert not lock.acquire(other, wait=False)
    assert lock.held_by(holder)
    lock.release(holder)
    assert lock.acquire(other, wait=False)


def test_waiting_is_cancelled_at_once(monkeypatch):
    """A bell, not the next look at the clock, ends it."""
    monkeypatch.setattr(lock_module, "PERIOD", 1000.0)
    lock, holder, waiting, cancelled = FairLock(), Holder(), Holder(), []
    lock.acquire(holder)
    thread, results = in_thread(lambda: lock.acquire(waiting, cancelled=lambda: bool(cancelled)))
    until(lambda: len(lock._queue) == 2)
    cancelled.append(True)
    waiting.ring()
    thread.join(20)
    assert results == [False]
    assert lock._queue == [holder]


def test_who_comes_first_goes_before_those_who_wait():
    lock, holder, waiting, closing = FairLock(), Holder(), Holder(), Holder()
    lock.acquire(holder)
    thread, _ = in_thread(lambda: lock.acquire(waiting))
    until(lambda: len(lock._queue) == 2)
    other, _ = in_thread(lambda: lock.acquire(closing, first=True))
    until(lambda: len(lock._queue) == 3)
    lock.release(holder)
    other.join(20)
    assert lock.held_by(closing)
    assert thread.is_alive()
    lock.release(closing)
    thread.join(20)
    assert lock.held_by(waiting)


class Leaving(Holder):
    def gives_way(self, other):
        return True


def test_one_that_gives_way_loses_the_lock():
    lock, leaving, other = FairLock(), Leaving(), Holder()
    lock.acquire(leaving)
    assert lock.acquire(other)
    lock.release(leaving)  # which does not have it any more
    assert lock.held_by(other)


@given(st.lists(st.tuples(st.sampled_from(["acquire", "release"]), st.integers(0, 3)), max_size=40))
@settings(deadline=None)
def test_releasing_is_idempotent(operations):
    """Against a model: a set of at most one holder, and nobody who does not hold can take anything away."""
    lock, holders, held = FairLock(), [Holder() for _ in range(4)], None
    for operation, number in operations:
        if operation == "release":
            lock.release(holders[number])
            held = None if held == number else held
        elif held != number:
            got = lock.acquire(holders[number], wait=False)
            assert got == (held is None)
            held = number if got else held
        assert [lock.held_by(holder) for holder in holders] == [held == i for i in range(4)]


def test_a_holder_is_released_by_the_garbage_collector_inside_of_the_lock():
    """A destructor may run at any moment, also while this thread is inside of the same lock."""
    lock, holder, waiting = FairLock(), Holder(), Holder()
    lock.acquire(holder)
    with guard:
        lock.release(holder)
        assert lock.acquire(waiting, wait=False)
    assert lock.held_by(waiting)


# --- those of models


@pytest.fixture(scope="module")
def models():
    return [tiny_model(), tiny_model("qwen3"), tiny_model("qwen2")]


def test_the_order_is_the_same_whoever_asks(models):
    first, second, third = models
    expected = [lock.number for lock in locks_of(models)]
    assert expected == sorted(expected)
    assert [lock.number for lock in locks_of([third, first, second, first])] == expected
    assert len(locks_of([first, first])) == 1


def test_models_that_share_their_layers_share_a_lock(models):
    other = copy.copy(models[0])
    assert locks_of([other]) == locks_of([models[0]]) != locks_of([models[1]])


def test_a_lock_goes_with_its_model():
    model = tiny_model()
    gc.collect()  # models of earlier tests may still be waiting for it
    before = len(lock_module._locks)
    locks_of([model])
    assert len(lock_module._locks) == before + 1
    del model
    gc.collect()
    assert len(lock_module._locks) == before


def test_one_thread_may_hold_a_model_twice(models):
    outer, inner = Hold(locks_of(models[:1])), Hold(locks_of(models[:1]))
    assert outer.take()
    nested = Hold(locks_of(models[:1]))
    assert nested.take()
    nested.give()
    assert not may_wait()
    with pytest.raises(BusyError, match="another thread is at work on this LlamaForCausalLM"):
        raise_in_thread(lambda: check_idle(models[:1]))
    outer.give()
    assert may_wait()
    assert inner.take()
    inner.give()
    check_idle(models)


def raise_in_thread(work):
    errors = []

    def catching():
        try:
            work()
        except BaseException as error:
            errors.append(error)

    in_thread(catching)[0].join(20)
    for error in errors:
        raise error


def test_who_is_inside_of_a_step_does_not_wait_for_another_model(models):
    """Two threads that each wanted the other's model in a callback would wait for ever."""
    mine, taken = Hold(locks_of(models[:1])), Hold(locks_of(models[1:2]))
    mine.take()
    thread, release = None, threading.Event()

    def other():
        hold = Hold(locks_of(models[1:2]))
        hold.take()
        release.wait(20)
        hold.give()

    thread, _ = in_thread(other)
    until(lambda: locks_of(models[1:2])[0].held())
    taken = Hold(locks_of(models[:2]))
    with pytest.raises(BusyError, match="inside of a callback or a step of another model, where it cannot wait"):
        taken.take()
    taken.give()
    assert not may_wait()  # the outer one
    release.set()
    thread.join(20)
    mine.give()
    check_idle(models)


def test_an_awaited_callback_waits_for_nobody(models):
    """It may take what is free; and whatever it ends with, its thread may wait again."""
    held = Hold(locks_of(models[:1]))
    raise_in_thread(lambda: held.take())  # by another thread, which is over

    def ask(number):
        assert not may_wait()
        free = Hold(locks_of(models[1:2]))
        assert free.take()
        free.give()
        awaited(lambda: None)()
        assert not may_wait()
        Hold(locks_of(models[:1])).take()

    with pytest.raises(BusyError, match="inside of a callback"):
        awaited(ask)(1)
    assert may_wait()
    assert awaited(lambda one, two=3: one + two)(1, two=2) == 3
    held.give()
    check_idle(models)


def test_many_threads_with_targets_and_drafts_in_all_orders(models):
    """No deadlock, and never two in one model at a time."""
    inside, most = [0, 0, 0], []

    def work(order):
        for _ in range(30):
            hold = Hold(locks_of([models[i] for i in order]))
            hold.take()
            for i in order:
                inside[i] += 1
            most.append(max(inside))
            time.sleep(0)
            for i in order:
                inside[i] -= 1
            hold.give()

    threads = [in_thread(lambda order=order: work(order))[0] for order in [(0, 1), (1, 0), (2, 1, 0), (0, 2), (1,)] * 2]
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert set(most) == {1}
    assert len(most) == 10 * 30


# --- do and undo


@pytest.mark.parametrize("at", range(6))
def test_undone_whenever_it_is_interrupted(at):
    """Before and in the work, as the undoing begins, in its middle, and after it."""
    moments, state = [], []

    def moment():
        moments.append(None)
        if len(moments) == at + 1:
            raise KeyboardInterrupt

    def work():
        moment()
        state.append("done")
        moment()

    def undo():
        moment()
        state.clear()
        moment()

    with pytest.raises(KeyboardInterrupt):
        do_and_undo(work, undo)
    assert state == []


def test_what_the_work_returns_and_raises_comes_out():
    assert do_and_undo(lambda: 7, lambda: None) == 7
    with pytest.raises(ZeroDivisionError):
        do_and_undo(lambda: 1 / 0, lambda: None)
