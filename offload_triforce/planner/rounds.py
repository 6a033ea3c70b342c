"""Rounds of drafting and passing, with a clock instead of a model: how much is drafted, how much of it a pass hides.

It follows the runtime piece by piece. Before a pass, the tree drafter makes steps as long as they pay (``_wanted``);
the likeliest draft tokens are read by the pass (``_pick``); while it is under way, steps go on as long as they fit into
the time in which it waits for tiles anyway (``DraftController.has_time``). When the verdict comes, what was drafted
behind the token that the text now ends with is kept, and everything else is thrown away (``move_to``).
"""

from __future__ import annotations

import functools
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields

from offload_triforce.config import Settings
from offload_triforce.planner.acceptance_length import AcceptanceByRank, Draws, Growth, Place, expected_length
from offload_triforce.scheduler.simulate import PassTime, RoundTime
from offload_triforce.speculation.growth import step_size

# The controller's own (``speculation.adaptive``): rounds that it remembers, steps before it knows anything, and by how
# much a step may be late.
ROUNDS, FIRST_STEPS, LATE = 16, 4, 1.25
# Rounds that are walked through: of a prediction, and of one that settings are compared by. The first ones, in which
# the controller finds its way, do not count.
WALKED, COMPARED, FINDING = 200, 40, 8


@dataclass(frozen=True)
class PassCurve:
    """Passes by the number of tokens that they read, ascending."""

    tokens: tuple[int, ...]
    passes: tuple[PassTime, ...]

    def at(self, tokens: float) -> PassTime:
        """On straight lines between what is known."""
        known = self.tokens
        high = next((i for i, size in enumerate(known) if size >= tokens), len(known) - 1)
        low = max(0, high - 1)
        share = (tokens - known[low]) / (known[high] - known[low]) if high > low else 0.0
        ends = zip(astuple(self.passes[low]), astuple(self.passes[high]), strict=True)
        return PassTime(*(max(0.0, a + share * (b - a)) for a, b in ends))

    @property
    def per_token(self) -> float:
        """Seconds that one more token takes."""
        more = self.passes[-1].seconds - self.passes[0].seconds
        return max(0.0, more / max(1, self.tokens[-1] - self.tokens[0]))


@dataclass(frozen=True)
class Costs:
    """What a round is made of, in seconds.

    Attributes:
        passes: by their tokens. covered: how long a step may take, until the ring is full and the link stands still.
        step_1, step_token: a step of the retrieval level over one token, and what each further one adds.
        draft_s: what level 0 takes per step.
    """

    passes: PassCurve
    covered: float
    step_1: float
    step_token: float
    draft_s: float = 0.0

    def step(self, tokens: int) -> float:
        """A step over that many tokens."""
        return self.step_1 + self.step_token * (tokens - 1)


@dataclass(frozen=True)
class Level0:
    """A drafter: how often the retrieval level accepts a token of it, and in what share of steps it drafts at all."""

    accepted: float
    offers: float = 1.0


@functools.lru_cache(maxsize=256)
def walk_rounds(
    table: AcceptanceByRank,
    level0: Level0,
    settings: Settings,
    costs: Costs,
    answer: int | None = None,
    rounds: int = WALKED,
) -> RoundTime:
    """The mean round.

    Args:
        table: acceptance of the retrieval level's candidates by the target. level0: what drafts for it.
        settings: gamma, gamma1, draft_tokens, topk, width, adaptive and overlap count.
        answer: answers of so many tokens each, with their first and last rounds; else a text that goes on and on.
        rounds: that are walked through, at least.
    """
    walk = _Walk(table, level0, settings, costs)
    if answer is None:
        endless = 2 * settings.gamma + 1  # no draft token is deeper, not even of those that are drafted ahead
        found = [walk.round(endless) for _ in range(rounds + FINDING)][FINDING:]
    else:
        found = []
        while len(found) < rounds:
            found += walk.answer(answer)
    mean = {part.name: statistics.fmean(getattr(one, part.name) for one in found) for part in fields(_Round)}
    tokens = mean["expected"] if answer is None else mean["brought"]
    steps, widest = mean["steps"], costs.step(settings.width + settings.gamma1)
    step_s = mean["stepping"] / steps if steps else widest
    return RoundTime(mean["passing"], step_s, costs.draft_s, steps, tokens, mean["hidden"], mean["picked"])


@dataclass(frozen=True)
class _Round:
    """Seconds and numbers of one round."""

    passing: float
    picked: int  # draft tokens that the pass read
    stepping: float  # not hidden, level 0 apart
    steps: int
    hidden: int
    expected: float  # tokens, the tree being what it is
    brought: int  # tokens, as it fell


class _Walk:
    """A text that is gone on with, round by round."""

    def __init__(self, table: AcceptanceByRank, level0: Level0, settings: Settings, costs: Costs) -> None:
        self.level0, self.settings, self.costs = level0, settings, costs
        self.draws = Draws(table)
        self.growth = Growth(self.draws, settings.topk, max(1, settings.most_draft_tokens))
        self.begin()

    def begin(self) -> None:
        """A new text, of which nothing is known."""
        self._rounds: deque[tuple[float, float]] = deque(maxlen=ROUNDS)
        self.growth.begin(Place(1.0, 0))

    def answer(self, tokens: int) -> list[_Round]:
        """All rounds of an answer of so many tokens to a new text."""
        self.begin()
        found: list[_Round] = []
        while tokens > 0:
            found.append(self.round(tokens))
            tokens -= found[-1].brought
        return found

    def round(self, left: int) -> _Round:
        """Draft, pass and move on. ``left``: tokens that are wanted yet."""
        settings, costs, growth = self.settings, self.costs, self.growth
        most, deepest = settings.most_draft_tokens, min(left - 1, settings.gamma)
        growth.limit(max(1, most))
        steps, stepping = 0, 0.0
        while leaves := self._wanted(steps, deepest):
            stepping += costs.step(self._step(leaves, deepest))
            steps += 1
        picked = growth.picked(most, deepest, self._least(costs.passes.per_token))
        passing = costs.passes.at(len(picked) + 1)
        hidden = self._go_on(min(left - 1, 2 * settings.gamma), passing.waited) if steps or self._rounds else 0
        brought = self._verdict({id(place) for place in picked})
        self._rounds.append((brought, passing.seconds + stepping + steps * costs.draft_s))
        return _Round(passing.seconds, len(picked), stepping, steps, hidden, expected_length(picked), brought)

    def _value(self) -> float | None:
        """Seconds that a token costs at the pace of the last rounds."""
        if not self._rounds:
            return None
        tokens, took = zip(*self._rounds, strict=True)
        return statistics.median(took) * len(took) / sum(tokens)

    def _least(self, per_token: float) -> float:
        """How likely a draft token has to be, for another ``per_token`` seconds to pay."""
        if not self.settings.adaptive:
            return 0.0
        value = self._value()
        value = self.costs.step(1) if value is None else value
        return per_token / value if value > 0 else 0.0

    def _wanted(self, steps: int, deepest: int) -> list[Place]:
        """The leaves for another step before the pass, if it pays."""
        settings, growth = self.settings, self.growth
        if not settings.adaptive and len(growth.draft_tokens) >= settings.most_draft_tokens:
            return []
        value = self._value()
        if settings.adaptive and value is None and steps >= FIRST_STEPS:
            return []
        leaves = self._leaves(deepest)
        if settings.adaptive and value is not None and leaves:
            gain = sum(leaf.chance for leaf in leaves)
            if gain * value <= self.costs.step(len(leaves)):
                growth.put_back(leaves)
                return []
        return leaves

    def _leaves(self, deepest: int) -> list[Place]:
        width = min(self.settings.width, self.settings.room - self.growth.held)
        return self.growth.leaves(width, deepest, self._least(self.costs.step_token)) if width > 0 else []

    def _step(self, leaves: list[Place], deepest: int) -> int:
        """Read the leaves, and what level 0 drafts behind the likeliest; returns how many tokens that were."""
        settings, place = self.settings, leaves[0]
        room = settings.room - self.growth.held - len(leaves)
        count = max(0, min(settings.gamma1, min(deepest, settings.gamma) - 1 - place.depth, room))
        if not self.level0.accepted or not self.draws.accepted(self.level0.offers, 1):
            count = 0
        kept = max(1, step_size(len(leaves) + count) - count)
        self.growth.put_back(leaves[kept:])
        leaves = leaves[:kept]
        for leaf in leaves:
            self.growth.read(leaf)
        for _ in range(self.draws.accepted(self.level0.accepted, count)):
            if not place.children or place.children[0].shares is not None:
                break
            place = place.children[0]
            self.growth.read(place)
        return len(leaves) + count

    def _go_on(self, deepest: int, waited: float) -> int:
        """Steps while a pass is under way that waits so long for its tiles; returns how many."""
        settings, costs, steps, spent = self.settings, self.costs, 0, 0.0
        widest = costs.step(settings.width)
        if not settings.overlap or widest > LATE * costs.covered:
            return 0
        self.growth.limit(max(1, 2 * settings.most_draft_tokens))
        while spent + widest <= waited and (leaves := self._leaves(deepest)):
            spent += costs.step(self._step(leaves, deepest)) + costs.draft_s
            steps += 1
        return steps

    def _verdict(self, picked: set[int]) -> int:
        """Follow the target from the root; returns the tokens that the text has got."""
        place, brought = self.growth.root, 1
        while place.shares is not None:
            rank = self.draws.rank(place.shares)
            if rank >= len(place.children):
                break
            place = place.children[rank]
            if id(place) not in picked:
                self.growth.begin(place)
                return brought
            brought += 1
        self.growth.begin(Place(1.0, 0))
        return brought


def pass_curve(block: int, predicted: Callable[[int], PassTime]) -> PassCurve:
    """``predicted``: a pass of so many tokens. ``block``: most of them."""
    sizes = sorted({1, 1 + block // 4, block})
    return PassCurve(tuple(sizes), tuple(predicted(size) for size in sizes))
