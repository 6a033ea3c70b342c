"""Who works with what, one after the other: a fair lock, and the one that every model has.

A model's modules are shared by all engines that were made of it, as target or as draft, and some steps change them for
a moment: the prefill records what each layer is given, experts are run in another way while a graph is captured, rotary
modules and quantised weights keep state of their own. So whoever runs a model holds its lock meanwhile, and no longer:
the probe, and each step of an answer (its prefill, or one pass with the drafting for it). Between two steps an answer
holds nobody's model, so a reader that takes its time keeps no other engine waiting; two engines of one model take
turns, step by step.

It cannot come to a deadlock: the locks of target and draft are taken in the order in which they were made; a thread
that is inside of a step may enter others of the same models (a callback may run another engine), and gets a
``BusyError`` instead of waiting for anything else.

What an exception interrupts is put right wherever it strikes. Ctrl-C may come between any two bytecodes, even as a
``finally`` begins: hence ``do_and_undo``, and locks that are held by an object and may be released more than once.
"""

from __future__ import annotations

import itertools
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

from torch import nn
from transformers import PreTrainedModel

from offload_triforce.errors import BusyError

T = TypeVar("T")
P = ParamSpec("P")

# Held for the moment in which a queue is looked at or changed. Re-entrant, and one for all locks: the garbage collector
# may let an abandoned holder of any of them go in that very moment.
guard = threading.RLock()

# Seconds between two looks of somebody who waits and has not been called.
PERIOD = 0.5


class Holder:
    """Who holds locks, or waits for them."""

    def __init__(self) -> None:
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()

    def ring(self) -> None:
        """Let it look again, if it waits. From any thread, and from a destructor too."""
        self._bell.put(None)

    def listen(self) -> None:
        """Wait until somebody rings, or some time is over."""
        try:
            self._bell.get(timeout=PERIOD)
        except queue.Empty:
            return

    def gives_way(self, other: Holder) -> bool:
        """Whether it loses the lock that it holds to ``other``, which waits for it in this thread."""
        return False


class FairLock:
    """A lock that is given to those who wait for it in the order in which they came.

    It is held by an object, not by a thread: an answer may be read by one thread after the other. Releasing is
    idempotent, so that it can be done on every way out, and from destructors.
    """

    def __init__(self) -> None:
        self._queue: list[Holder] = []  # the first one holds the lock

    def acquire(
        self,
        holder: Holder,
        wait: bool = True,
        cancelled: Callable[[], bool] = lambda: False,
        first: bool = False,
    ) -> bool:
        """Get the lock for ``holder``; False if it is taken and there is to be no waiting, or no longer.

        Args:
            holder: it must not hold this lock already.
            wait: until it is free. cancelled: ends the waiting; asked when the holder is rung.
            first: before all others that wait.
        """
        with guard:
            self._queue.insert(1 if first else len(self._queue), holder)
        while not self._has(holder):
            if not wait or cancelled():
                self.release(holder)
                return False
            holder.listen()
        return True

    def release(self, holder: Holder) -> None:
        """Give the lock to the next, or no longer wait for it. Nothing happens if ``holder`` does neither."""
        with guard:
            if holder in self._queue:
                self._queue.remove(holder)
            if self._queue:
                self._queue[0].ring()

    def held_by(self, holder: Holder) -> bool:
        """Whether it is the one that holds the lock."""
        with guard:
            return self._queue[:1] == [holder]

    def held(self) -> bool:
        """Whether anybody holds it."""
        return bool(self._queue)

    def call(self) -> None:
        """Let all who wait look again."""
        with guard:
            for holder in self._queue[1:]:
                holder.ring()

    def _has(self, holder: Holder) -> bool:
        with guard:
            first = self._queue[0]
            if first is not holder and first.gives_way(holder):
                self.release(first)
            return self._queue[0] is holder


class ModelLock(FairLock):
    """The lock of one model. ``number``: its place in the order in which several are taken."""

    _numbers = itertools.count()

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.number = name, next(self._numbers)


_locks: weakref.WeakKeyDictionary[nn.Module, ModelLock] = weakref.WeakKeyDictionary()
_making = threading.RLock()


def locks_of(models: Sequence[PreTrainedModel]) -> list[ModelLock]:
    """The locks of some models, each once, in the order in which they are to be taken.

    A lock belongs to the decoder, which several models may share.
    """
    with _making:
        locks = {_locks.setdefault(_decoder(m), ModelLock(type(m).__name__)) for m in models}
    return sorted(locks, key=lambda lock: lock.number)


def _decoder(model: PreTrainedModel) -> nn.Module:
    try:
        decoder = model.get_decoder()
    except (AttributeError, NotImplementedError):
        return model
    return decoder if isinstance(decoder, nn.Module) else model


class _Here(threading.local):
    """What this thread holds."""

    locks: tuple[ModelLock, ...] = ()
    awaited = False  # others wait for it, or may


_here = _Here()


def may_wait() -> bool:
    """Whether this thread may wait for what others hold: it is not at work on a model, nor in an awaited callback."""
    return not (_here.locks or _here.awaited)


def awaited(callback: Callable[P, T]) -> Callable[P, T]:
    """The same callback, for work that others wait for: it gets a ``BusyError`` where it would wait for them."""

    def call(*args: P.args, **options: P.kwargs) -> T:
        before = _here.awaited

        def work() -> T:
            _here.awaited = True
            return callback(*args, **options)

        return do_and_undo(work, lambda: setattr(_here, "awaited", before))

    return call


class Hold(Holder):
    """Some models' locks, held by this thread."""

    def __init__(self, locks: Sequence[ModelLock]) -> None:
        super().__init__()
        self._locks, self._before = locks, _here.locks

    def take(self, wait: bool = True, cancelled: Callable[[], bool] = lambda: False) -> bool:
        """Take those that this thread does not hold yet; False if ``cancelled`` says so before they are free.

        Raises:
            BusyError: one is taken, and there is to be no waiting, or it might never end.
        """
        for lock in self._locks:
            if lock in self._before:
                continue
            nested = bool(self._before) or _here.awaited
            if not lock.acquire(self, wait and not nested, cancelled):
                if cancelled():
                    return False
                hint = (
                    "this thread is inside of a callback or a step of another model, where it cannot wait for it"
                    if nested
                    else "call without wait=False to wait for it"
                )
                raise BusyError(f"another thread is at work on this {lock.name}; {hint}")
            _here.locks += (lock,)
        return True

    def give(self) -> None:
        """Give them back, as far as they are held. As often as one likes."""
        for lock in self._locks:
            lock.release(self)
        _here.locks = self._before


def check_idle(models: Sequence[PreTrainedModel]) -> None:
    """For those who do not want to wait.

    Raises:
        BusyError: another thread is at work on one of the models right now.
    """
    hold = Hold(locks_of(models))
    do_and_undo(lambda: hold.take(wait=False), hold.give)


def do_and_undo(work: Callable[[], T], undo: Callable[[], object]) -> T:
    """``work()``; afterwards, whatever happens, ``undo()``, twice.

    An interruption can strike as the first one begins, or in the middle of it. It may then run to its end all the same.
    """
    try:
        try:
            return work()
        finally:
            undo()
    finally:
        undo()
