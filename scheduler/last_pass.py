"""The time line of the last pass, for somebody who looks now and then: it costs nothing while nobody does."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from offload_triforce.scheduler.device import VERIFY, Device
from offload_triforce.scheduler.trace import Span, Trace

# Seconds for which spans are written down after somebody has looked.
LEASE = 15.0
# Spans that are kept: a pass over a million tokens is about 8,000 tiles of 16 MB, two spans each.
MOST = 40_000


class LastPass(Trace):
    """The newest spans of a device. It takes itself off the device when nobody has looked for ``LEASE`` seconds."""

    def __init__(self, device: Device, most: int = MOST, clock: Callable[[], float] = time.monotonic) -> None:
        """``most``: spans that are kept, the newest. ``clock``: seconds."""
        super().__init__()
        self._device, self._clock = device, clock
        self._until = 0.0
        self._known: deque[Span] = deque(maxlen=most)
        self._coming: deque[Callable[[], Span]] = deque(maxlen=most)  # the device may not be through with them
        self._guard = threading.Lock()

    def look(self) -> list[Span]:
        """The spans of the last whole pass, and of what led up to it since the pass before: in order.

        Empty at first: from now on they are written down, unless somebody else traces the device. From any thread.
        """
        self._until = self._clock() + LEASE
        if self._device.trace is None:
            with self._guard:
                self._known.clear()
                self._coming.clear()
            self._device.trace = self
        return last_pass(self.spans())

    def add(self, span: Span) -> None:
        """Write down a span that is over."""
        if self._goes_on():
            with self._guard:
                self._known.append(span)

    def add_later(self, span: Callable[[], Span]) -> None:
        """Write down a span whose times are known only after the device is through."""
        if self._goes_on():
            with self._guard:
                self._coming.append(span)

    def spans(self) -> list[Span]:
        """All that are kept and over, in the order of their beginning. The device may be at work."""
        with self._guard:
            while self._coming and (span := _if_over(self._coming[0])) is not None:
                self._coming.popleft()
                self._known.append(span)
            known = list(self._known)
        return sorted(known, key=lambda span: span.start)  # outside: nobody who decodes waits for it

    def _goes_on(self) -> bool:
        if self._clock() < self._until:
            return True
        if self._device.trace is self:
            self._device.trace = None
        return False


def _if_over(span: Callable[[], Span]) -> Span | None:
    """None where the device is not through: asking CUDA for the time of such an event is an error."""
    try:
        return span()
    except RuntimeError:
        return None


def last_pass(spans: list[Span]) -> list[Span]:
    """Those of ``spans``, in order, that belong to the last pass: from the end of the one before to its own end."""
    passes = [span for span in spans if span.track == VERIFY]
    if not passes:
        return []
    whole = max(passes, key=lambda span: span.end)
    before = max((span.end for span in passes if span.end <= whole.start), default=whole.start)
    return [span for span in spans if span.start < whole.end and span.end > before]
