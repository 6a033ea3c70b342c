"""What passes and steps compute where nothing has to be copied: measured on a ``Subject``, piece by piece."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from offload_triforce.bench.subject import QUERIES, Subject
from offload_triforce.scheduler.device import COMPUTE
from offload_triforce.scheduler.simulate import PassWork
from offload_triforce.scheduler.trace import Trace

REPEATS = 5  # of a pass; the median counts
PASS = "pass"


class Works:
    """What passes over a resident cache compute, by the number of their tokens, and steps: no link is in their way.

    Attributes:
        step_token: seconds that a step of the retrieval level takes longer for each further token.
    """

    def __init__(self, subject: Subject) -> None:
        tiles, block = subject.runtime.caches.full.tiles, subject.settings.block
        self._seen = {n: measure_work(subject, n, tiles) for n in (1, QUERIES, 5 * QUERIES, block) if n <= block}
        self.step_token = _step_token(subject) if block > 1 else 0.0

    @property
    def most(self) -> int:
        """Tokens of the widest pass that was measured."""
        return max(self._seen)

    def of(self, tokens: float) -> PassWork:
        """Straight lines between what was measured."""
        sizes = sorted(self._seen)
        if len(sizes) == 1:
            return self._seen[sizes[0]]
        high = next((size for size in sizes[1:] if size >= tokens), sizes[-1])
        low = sizes[sizes.index(high) - 1]
        share = (tokens - low) / (high - low)
        ends = (self._seen[low], self._seen[high])
        first, last = ([*work.gaps, work.tile] for work in ends)
        *gaps, tile = (max(0.0, a + share * (b - a)) for a, b in zip(first, last, strict=True))
        return PassWork(tuple(gaps), tile)


def _step_token(subject: Subject) -> float:
    for queries in (1, QUERIES):
        subject.draft(queries)  # the first one warms up
    turns = [(subject.draft(1), subject.draft(QUERIES)) for _ in range(REPEATS)]
    return statistics.median(max(0.0, wide - narrow) for narrow, wide in turns) / (QUERIES - 1)


def measure_work(subject: Subject, queries: int, tiles: int) -> PassWork:
    """What a pass of so many queries over ``tiles`` tiles per layer computes: before, at and after the tiles.

    Medians over REPEATS passes. Nothing should be waited for: all tiles are resident.
    """
    subject.verify(queries)
    return median_work([pieces(subject, queries, tiles) for _ in range(REPEATS)])


def pieces(subject: Subject, queries: int, tiles: int) -> list[float]:
    """Seconds of one pass, as ``split`` has them."""
    trace = subject.device.trace = Trace()
    try:
        with subject.device.span(PASS, PASS):
            subject.verify(queries)
        return split(trace.spans(), subject.runtime.caches.full.stream.plan.layers, tiles)
    finally:
        subject.device.trace = None


def median_work(found: Sequence[Sequence[float]]) -> PassWork:
    """Each piece's median over passes."""
    *gaps, tile = (statistics.median(values) for values in zip(*found, strict=True))
    return PassWork(tuple(gaps), tile)


def split(spans: Sequence[Any], layers: int, tiles: int) -> list[float]:
    """Seconds of a pass before the tiles of each layer, after the last ones, and per tile, from its time line."""
    (whole,) = (span for span in spans if span.track == PASS)
    at_tiles = [span for span in spans if span.track == COMPUTE]
    found, ended, busy = [], whole.start, 0.0
    for layer in range(layers):
        own = at_tiles[layer * tiles : (layer + 1) * tiles]
        if not own:
            continue
        found.append(own[0].start - ended)
        ended = own[-1].end
        busy += ended - own[0].start
    return [*found, whole.end - ended, busy / (layers * tiles)]
