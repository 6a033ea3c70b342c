"""A CPU without an emulated link: the device's memory is host memory, so that nothing has to cross anything."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from offload_triforce.scheduler.clock import HostMark
from offload_triforce.scheduler.device import COMPUTE
from offload_triforce.scheduler.emulated import move
from offload_triforce.scheduler.trace import Trace, host_span


class _Done:
    """What an event is where everything has been done by the time that somebody asks."""

    def wait(self) -> None:
        """Nothing is under way."""

    def arrived(self) -> bool:
        return True

    def reach(self) -> None:
        """It has been reached."""


_DONE = _Done()


class _Memory:
    """A lane where there is no link. What has to be copied is copied at once; no byte of it counts as moved."""

    moved = 0

    def submit(
        self,
        target: Tensor,
        source: Tensor,
        after: _Done | None = None,
        first: Callable[[], None] | None = None,
        then: Callable[[], None] | None = None,
    ) -> _Done:
        """Copy."""
        for work in (first, partial(move, target, source), then):
            if work is not None:
                work()
        return _DONE


class HostDevice:
    """The host computes, on the caller's own thread, and attends to tiles where they lie in its memory."""

    unified = True
    gbps = None  # there is no link

    def __init__(self, trace: Trace | None = None) -> None:
        self.trace = trace
        self.incoming = self.outgoing = _Memory()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A buffer, contents undefined."""
        return torch.empty(shape, dtype=dtype)

    host_empty = empty

    def reclaim(self) -> None:
        """Nothing to do: the C library gives large blocks back at once."""

    def record(self) -> _Done:
        """The computation issued so far, which is over."""
        return _DONE

    def catch_up(self) -> None:
        """Nothing to wait for."""

    def mark(self) -> HostMark:
        """Now."""
        return HostMark()

    def release(self, buffer: Tensor) -> _Done:
        """Nobody uses the buffer any more."""
        return _DONE

    def await_landing(self, landed: _Done) -> Callable[[], float]:
        """It has landed."""
        return lambda: 0.0

    def launch(self, name: str, work: Callable[..., None], *args: Any) -> None:
        """Compute at once."""
        with self.span(COMPUTE, name):
            work(*args)

    def finish(self) -> None:
        """Nothing to do: what was launched is over."""

    def span(self, track: str, name: str, size: int = 0) -> AbstractContextManager[None]:
        """Trace what is done inside, if there is a trace."""
        return host_span(self.trace, track, name, size)

    def close(self) -> None:
        """Nothing is under way."""
