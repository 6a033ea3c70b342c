"""Trees grown over recorded answers (``growth_record``) by the library's own code, as many as it takes to tell.

Along the answer, level 1 offers what it did offer. Beside it nothing was recorded: there it offers what it did at some
other place of the same answer, drawn by a fixed hash; that is never accepted, and what matters is how sure it looks.
"""

from __future__ import annotations

import math
import statistics
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.growth_record import STRIDE, Record
from offload_triforce.config import Settings
from offload_triforce.runtime.runtime import limits_of
from offload_triforce.scheduler.clock import HostClock
from offload_triforce.scheduler.pipeline import Slack
from offload_triforce.speculation.acceptance import COUPLING_PRIOR, MOST_CANDIDATES, DraftToken, Ranking
from offload_triforce.speculation.adaptive import AcceptanceModel, DraftController, GivenCosts
from offload_triforce.speculation.draft_selector import DraftSelector
from offload_triforce.speculation.hierarchy import decode
from offload_triforce.speculation.ngram import NgramDrafter
from offload_triforce.speculation.place import Place
from offload_triforce.speculation.sampling import Survey
from offload_triforce.speculation.stats import DecodeStats
from offload_triforce.speculation.text import TokenText
from offload_triforce.speculation.tree import Node, tokens_of
from offload_triforce.speculation.tree_drafter import TreeDrafter

# No pass begins in the last tokens of an answer: behind it, nobody knows what would have been accepted.
TAIL = 48
# Answer tokens that are there when a replay begins: several replays of one record tell more than one.
STARTS = (0, 7, 14)


class RecordedLevel:
    """Level 1, and the acceptance rule over what it offers, of one record."""

    prior = COUPLING_PRIOR

    def __init__(self, record: Record, text: TokenText) -> None:
        self.record, self.text = record, text
        self.refresh = self.answered // STRIDE * STRIDE
        self._nodes: Sequence[Node] = ()
        pairs = [zip(offers.scores, offers.tokens, strict=True) for offers in record.offers.values()]
        self._all = [pair for offers in pairs for pair in offers]

    @property
    def answered(self) -> int:
        """Answer tokens that are decided."""
        return self.text.decided - len(self.record.prompt)

    def score(self, nodes: Sequence[Node], before: Sequence[Node]) -> Tensor:
        """Read nodes: which, is all that counts."""
        self._nodes = nodes
        return torch.zeros(len(nodes), 1)

    def keep(self, kept: Sequence[int]) -> None:
        """Nothing is held."""

    def draft(self, logits: Tensor, place: Place) -> DraftToken | None:
        """There is no draft model."""

    def candidates(
        self, logits: Tensor, places: Sequence[Place], drafted: Sequence[DraftToken | None]
    ) -> list[Ranking]:
        """Those of the nodes that were just read."""
        offered = [self._offered(tokens_of(node.path()[1:])) for node in self._nodes]
        return [Ranking(scores[:MOST_CANDIDATES], tokens[:MOST_CANDIDATES]) for scores, tokens in offered]

    def _offered(self, path: list[int]) -> tuple[list[float], list[int]]:
        start = self.answered
        place = start + len(path) - self.refresh
        offers = self.record.offers[self.refresh]
        if path == self.record.answer[start : start + len(path)] and place < len(offers.tokens):
            return offers.scores[place], offers.tokens[place]
        return self._all[zlib.crc32(array("q", [start, *path]).tobytes()) % len(self._all)]

    def survey(self, logits: Tensor, nodes: Sequence[Node], text: TokenText) -> Survey:
        """Nothing that ``verdict`` needs."""
        return Survey(sound=True, rows=[None] * len(nodes))

    def verdict(self, logits: Tensor, place: Place, candidates: Any, offered: int, told: Any = None) -> int:
        """The answer's token."""
        return self.record.answer[place.position - len(self.record.prompt)]


class RecordedTarget:
    """Level 2 of one record: it refreshes level 1's cache in each pass, to the nearest place that was recorded."""

    def __init__(self, level: RecordedLevel) -> None:
        self.level = level

    def score(self, nodes: Sequence[Node], idle: Any) -> Tensor:
        """Read nodes: nothing to do."""
        return torch.zeros(len(nodes), 1)

    def slack(self) -> Slack:
        """A pass leaves time for as much drafting as it takes itself."""
        return Slack(1.0, math.inf)

    def commit(self, kept: Sequence[int]) -> None:
        """The pass is over."""
        self.level.refresh = min(self.level.answered // STRIDE * STRIDE, max(self.level.record.offers))


def replay(record: Record, settings: Settings, start: int = 0) -> DecodeStats:
    """Decode a recorded answer from its token ``start`` on, until a pass has got to its last TAIL tokens.

    ``draft_cost`` must be set; budget, bits, refresh and rule are those of the record.
    """
    known, last = record.prompt + record.answer[:start], len(record.prompt) + len(record.answer) - TAIL
    text = TokenText(torch.tensor(known), len(record.prompt) + len(record.answer) + 2 * settings.gamma + 1)
    level, stats = RecordedLevel(record, text), DecodeStats()
    selector = DraftSelector([NgramDrafter(max(known) + 1)], settings.gamma1, settings.adaptive)
    limits = limits_of(settings)
    controller, clock = DraftController(GivenCosts(settings.draft_cost)), HostClock()
    acceptance = AcceptanceModel(level.prior)
    drafter = TreeDrafter(level, selector, level, limits, acceptance, controller, lambda token: False, stats, clock)
    limit = len(record.answer) - start
    for _ in decode(RecordedTarget(level), drafter, level, text, limit, stats, lambda text: False):
        if len(text) >= last:
            break
    return stats


@dataclass(frozen=True)
class Replayed:
    """What a way of growing came to. ``stats``: of each record, of each of its replays."""

    settings: Settings
    stats: list[list[DecodeStats]]

    @property
    def tokens_per_pass(self) -> list[float]:
        """Mean acceptance length of each answer."""
        return [_sum(runs, "new_tokens") / _sum(runs, "passes") for runs in self.stats]

    @property
    def speed(self) -> list[float]:
        """Tokens in the time of a pass, with the drafting that passes did not hide."""
        cost = self.settings.draft_cost

        def time(runs: list[DecodeStats]) -> float:
            return _sum(runs, "passes") + cost * (_sum(runs, "steps") - _sum(runs, "steps_ahead"))

        return [_sum(runs, "new_tokens") / time(runs) for runs in self.stats]

    def per_pass(self, name: str) -> float:
        """Of one of the counts."""
        return sum(_sum(runs, name) for runs in self.stats) / sum(_sum(runs, "passes") for runs in self.stats)


def _sum(runs: Sequence[DecodeStats], name: str) -> int:
    return sum(getattr(run, name) for run in runs)


def replay_all(records: Sequence[Record], settings: Settings) -> Replayed:
    """All of them."""
    return Replayed(settings, [[replay(record, settings, start) for start in STARTS] for record in records])


def ratio(ours: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """The geometric mean of the ratios, answer by answer, and its standard error."""
    logs = [math.log(one / other) for one, other in zip(ours, others, strict=True)]
    mean = math.exp(statistics.fmean(logs))
    return mean, mean * statistics.stdev(logs) / len(logs) ** 0.5 if len(logs) > 1 else math.nan
