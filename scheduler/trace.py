"""A time line: what each copy engine and the computation did when, as a Chrome/Perfetto trace."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple


class Span(NamedTuple):
    """Something that took time. ``start`` and ``end`` in seconds since the trace began."""

    track: str
    name: str
    start: float
    end: float
    size: int = 0  # bytes, for copies


class Trace:
    """Spans of any number of tracks. Safe to use from several threads."""

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._open: list[Callable[[], Span]] = []
        self._lock = threading.Lock()

    def add(self, span: Span) -> None:
        """Write down a span that is over."""
        with self._lock:
            self._spans.append(span)

    def add_later(self, span: Callable[[], Span]) -> None:
        """Write down a span whose times are known only after the device is through (CUDA events)."""
        with self._lock:
            self._open.append(span)

    def spans(self) -> list[Span]:
        """All spans in the order of their beginning. The device must be through with everything."""
        with self._lock:
            self._spans += [span() for span in self._open]
            self._open.clear()
            return sorted(self._spans, key=lambda span: span.start)

    def write(self, path: Path) -> None:
        """Write the trace event format that chrome://tracing and ui.perfetto.dev open: times in microseconds."""
        spans = self.spans()
        origin = spans[0].start if spans else 0.0
        tracks = list(dict.fromkeys(span.track for span in spans))
        events = [
            {"ph": "M", "pid": 1, "tid": i, "name": "thread_name", "args": {"name": track}}
            for i, track in enumerate(tracks)
        ]
        for span in spans:
            event = {"ph": "X", "pid": 1, "tid": tracks.index(span.track), "name": span.name}
            event |= {"ts": (span.start - origin) * 1e6, "dur": (span.end - span.start) * 1e6}
            if span.size:
                event["args"] = {"bytes": span.size, "GB/s": span.size / max(span.end - span.start, 1e-9) / 1e9}
            events.append(event)
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def busy(spans: list[Span], track: str) -> float:
    """Seconds in which at least one span of the track was under way."""
    total, until = 0.0, float("-inf")
    for span in sorted((s for s in spans if s.track == track), key=lambda s: s.start):
        total += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return total


@contextlib.contextmanager
def host_span(trace: Trace | None, track: str, name: str, size: int = 0) -> Iterator[None]:
    """Write down what the host itself does inside, if there is a trace."""
    started = time.perf_counter()
    yield
    if trace is not None:
        trace.add(Span(track, name, started, time.perf_counter(), size))
