"""Whose turn it is on an engine: it has one set of caches, so one answer at a time.

An answer takes its turn when it is asked for (``stream``, ``run``) and keeps it until it is over: read to its end,
closed, cancelled, ended by an exception, or no longer referred to by anybody, as after a ``break`` out of ``for piece
in engine.stream(...)``. Others wait meanwhile, in the order in which they came. Two kinds of waiting would never end:

- A thread that asks for another answer while its own older one is paused (between two pieces) would wait for itself.
  So the older one is given up for the newer, and says so when it is read on. The same holds for an answer that only
  threads which have ended had in hands. One that another living thread has had in hands is waited for.
- A callback (progress of a prefill or of a save, a logits processor) would wait for the step or the save that it is
  called by: it gets a ``BusyError``. So does whatever else a thread asks for while it is at work for the same engine,
  as a signal handler may.

``close`` gives up whatever answer is paused, whoever reads it, and waits for no more than the step that is running.
What nothing sees is a circle: two threads that each keep a paused answer of one engine, and ask the other's engine for
another. A thread that works with several shared engines should read or close one answer before it asks for the next.
"""

from __future__ import annotations

import threading

from offload_triforce.errors import BusyError, InputError
from offload_triforce.model.lock import FairLock, Holder, guard, may_wait


class CancelledAnswer(Exception):
    """Raised inside of an answer that has been cancelled; it ends there."""


class Answer(Holder):
    """One answer as the caches see it: at work or paused, and in whose hands it has been.

    Attributes:
        worker: the thread that works on it, or is about to; None while it is paused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cancelled = False
        self.worker: threading.Thread | None = threading.current_thread()
        self._threads: list[threading.Thread] = []  # that have had it in hands

    def cancel(self) -> None:
        """Let it end at its next pass or chunk of the prompt, or stop waiting. From any thread."""
        self.cancelled = True
        self.ring()

    def check(self) -> None:
        """For places in the middle of long work.

        Raises:
            CancelledAnswer: it is to end here.
        """
        if self.cancelled:
            raise CancelledAnswer

    def gives_way(self, other: Holder) -> bool:
        """See the module. Called in the thread of ``other``."""
        mine = threading.current_thread()
        return self.worker is None and (
            self.cancelled
            or isinstance(other, Closing)
            or all(thread is mine or not thread.is_alive() for thread in self._threads)
        )

    def begin(self) -> None:
        """This thread works on it."""
        self.worker = threading.current_thread()
        if self.worker not in self._threads:
            self._threads.append(self.worker)

    def pause(self) -> None:
        """Nobody works on it, until its reader wants more."""
        self.worker = None


class Closing(Holder):
    """Holds an engine's caches while they are given back. ``worker``: the thread that does it."""

    def __init__(self) -> None:
        super().__init__()
        self.worker = threading.current_thread()


class Turns(FairLock):
    """The turns of one engine."""

    def take(self, answer: Answer, wait: bool) -> None:
        """Begin an answer when its turn comes. To be followed by ``release`` in any case.

        Raises:
            BusyError: another one is under way, and there is to be no waiting, or it would never end.
            CancelledAnswer: cancelled meanwhile.
        """
        hopeless = self._hopeless()
        answer.begin()
        if self.acquire(answer, wait and not hopeless, lambda: answer.cancelled):
            return
        answer.check()
        if hopeless:
            raise BusyError(
                "this engine is in the middle of an answer or a save, and a callback cannot wait for what it is called "
                "by; ask when that has returned"
            )
        raise BusyError("this engine is busy with another answer; call without wait=False to wait for its end")

    def resume(self, answer: Answer) -> None:
        """Go on with an answer.

        Raises:
            InputError: it has been given up meanwhile.
        """
        with guard:
            if not self.held_by(answer):
                raise InputError("this answer was given up: its engine has been closed or asked for another since")
            answer.begin()

    def pause(self, answer: Answer) -> None:
        """A step of an answer is over: whoever it gives way to may come now."""
        answer.pause()
        self.call()

    def close(self, closing: Closing) -> None:
        """Give up whatever answer there is, as soon as it is paused. To be followed by ``release`` in any case.

        Raises:
            BusyError: called by a callback of that answer, or of a save.
        """
        if not self.acquire(closing, wait=not self._hopeless(), first=True):
            raise BusyError(
                "this engine is in the middle of an answer or a save, and cannot be closed by one of its callbacks"
            )

    def _hopeless(self) -> bool:
        """Whether waiting might never end: this thread is at work for one that has the turn, or that waits for it."""
        with guard:
            return not may_wait() or any(each.worker is threading.current_thread() for each in self._queue)
