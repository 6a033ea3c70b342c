"""What drafting costs and what it brings, found out on the way: how far to draft follows from both."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from offload_triforce.scheduler.pipeline import Slack
from offload_triforce.speculation.latency import LatencyFit
from offload_triforce.speculation.tree import Candidates
from offload_triforce.speculation.trials import Trials

# Odds that a candidate is what the target takes, by rank and kind (see ``acceptance``). Where measurement begins.
PRIOR_WEIGHT = 12.0
# So many rounds of the past count.
ROUNDS = 16
# A step may take so many times as long as the link goes on beside it: that holds the pass up by less than it spares.
LATE = 1.25


class AcceptanceModel:
    """How often a candidate of a rank and kind is accepted: was what the target took."""

    def __init__(self, prior: Sequence[Sequence[float]]) -> None:
        """``prior``: estimates [ranks][kinds], which count like PRIOR_WEIGHT observations."""
        self._taken = PRIOR_WEIGHT * np.array(prior)
        self._seen = np.full(self._taken.shape, PRIOR_WEIGHT)

    @property
    def ranks(self) -> int:
        """Candidates that are told apart."""
        return len(self._taken)

    def chance(self, candidates: Candidates, rank: int) -> float:
        """Estimated probability that the candidate of that rank is taken."""
        kind = candidates.kind(rank)
        return float(self._taken[rank, kind] / self._seen[rank, kind])

    def learn(self, candidates: Candidates, taken: int) -> None:
        """The target took token ``taken`` where there were these candidates."""
        for rank, token in enumerate(candidates.tokens[: self.ranks]):
            kind = candidates.kind(rank)
            self._seen[rank, kind] += 1
            self._taken[rank, kind] += token == taken


class Costs(Protocol):
    """What steps of the retrieval level and passes cost, in whatever unit: seconds, or passes.

    Attributes:
        timed: costs follow the clock, so those of the drafters count as well.
        first_steps: to make before it is known what a pass brings.
        slack: what the last pass left time for, in the same unit.
    """

    timed: bool
    first_steps: int
    slack: Slack

    def step(self, tokens: int, seconds: float, drafting: float) -> float:
        """A step over that many tokens was made, after a drafter had taken its time: what it cost."""

    def verified(self, nodes: int, seconds: float, slack: Slack) -> float:
        """A pass over that many nodes was made: what it cost."""

    def of_step(self, tokens: int) -> float:
        """What a step of that many tokens costs."""

    def of_pass(self, nodes: int) -> float:
        """What a pass over that many nodes costs."""

    def mean(self, rounds: Sequence[float]) -> float:
        """What a round costs, by those that have been."""

    def least_in_step(self, value: float | None) -> float:
        """How likely a draft token has to be accepted, for reading it in a step that is made anyway to pay.

        ``value``: of a token; None before the first pass, when nobody knows it.
        """

    def least_in_pass(self, value: float | None) -> float:
        """The same for reading it in a pass."""


class MeasuredCosts:
    """Costs by the clock, in seconds."""

    timed = True
    first_steps = 4  # a step may cost less than a pass spares; and somebody waits for the first token

    def __init__(self) -> None:
        self.steps, self.passes = LatencyFit(), LatencyFit()
        self.slack = Slack()

    def step(self, tokens: int, seconds: float, drafting: float) -> float:
        """See ``Costs``."""
        self.steps.add(tokens, seconds)
        return seconds + drafting

    def verified(self, nodes: int, seconds: float, slack: Slack) -> float:
        """See ``Costs``."""
        self.passes.add(nodes, seconds)
        self.slack = slack
        return seconds

    def of_step(self, tokens: int) -> float:
        """See ``Costs``. The first one has to be made to tell."""
        return self.steps.at(tokens) if self.steps else 0.0

    def of_pass(self, nodes: int) -> float:
        """See ``Costs``."""
        return self.passes.at(nodes) if self.passes else 0.0

    def mean(self, rounds: Sequence[float]) -> float:
        """See ``Costs``. The first rounds are no measure: kernels are compiled and graphs captured in them."""
        return statistics.median(rounds)

    def least_in_step(self, value: float | None) -> float:
        """See ``Costs``."""
        return self._least(self.steps, value)

    def least_in_pass(self, value: float | None) -> float:
        """See ``Costs``."""
        return self._least(self.passes if self.passes.tells_sizes_apart else self.steps, value)

    def _least(self, fit: LatencyFit, value: float | None) -> float:
        if not self.steps:
            return 0.0
        # Before the first pass, nobody knows what a token is worth: not less than the step that drafts it.
        value = self.steps.at(1) if value is None else value
        return fit.per_token / value if value > 0 else 0.0


class GivenCosts:
    """Costs as somebody gives them, in passes: what is drafted depends on no clock, and can be repeated."""

    timed = False
    first_steps = 12

    def __init__(self, draft_cost: float) -> None:
        """``draft_cost``: of a step of the retrieval level, whatever it reads."""
        self.draft_cost, self.slack = draft_cost, Slack(1.0, math.inf)

    def step(self, tokens: int, seconds: float, drafting: float) -> float:
        """See ``Costs``."""
        return self.draft_cost

    def verified(self, nodes: int, seconds: float, slack: Slack) -> float:
        """See ``Costs``."""
        return 1.0

    def of_step(self, tokens: int) -> float:
        """See ``Costs``."""
        return self.draft_cost

    def of_pass(self, nodes: int) -> float:
        """See ``Costs``."""
        return 1.0

    def mean(self, rounds: Sequence[float]) -> float:
        """See ``Costs``."""
        return statistics.fmean(rounds)

    def least_in_step(self, value: float | None) -> float:
        """See ``Costs``: one more token in a step costs nothing."""
        return 0.0

    def least_in_pass(self, value: float | None) -> float:
        """See ``Costs``: nor does one in a pass."""
        return 0.0


def make_costs(draft_cost: float | None) -> Costs:
    """``draft_cost``: of a step, in passes; None measures both."""
    return MeasuredCosts() if draft_cost is None else GivenCosts(draft_cost)


class DraftController:
    """How far drafting pays: tokens per unit of cost in the last rounds, and what another step would cost."""

    def __init__(self, costs: Costs, trials: Trials | None = None) -> None:
        """``trials``: whether steps pay at all, where that has to be found out."""
        self.costs, self._trials = costs, trials
        self._rounds: deque[tuple[int, float]] = deque(maxlen=ROUNDS)
        self._spent = self._hidden = 0.0
        self._stepped = False

    def step(self, tokens: int, seconds: float, drafting: float, hidden: bool) -> None:
        """A step of the retrieval level was made, after a drafter had taken its time.

        ``hidden``: while something else was waited for.
        """
        cost, self._stepped = self.costs.step(tokens, seconds, drafting), True
        if hidden:
            self._hidden += cost
        else:
            self._spent += cost

    def round(self, nodes: int, seconds: float, new_tokens: int, slack: Slack) -> None:
        """A pass over that many nodes ended a round, which brought that many tokens. ``slack``: of that pass."""
        cost = self._spent + self.costs.verified(nodes, seconds, slack)
        self._rounds.append((new_tokens, cost))
        if self._trials is not None:
            self._trials.round(new_tokens, cost)
        self._spent = self._hidden = 0.0

    def begin_round(self) -> None:
        """A round begins: it is decided whether level 1 is tried again."""
        if self._trials is not None:
            self._trials.begin()

    @property
    def rests(self) -> bool:
        """Whether level 1 makes no steps for now, as they do not pay."""
        return self._trials is not None and self._trials.resting

    def gives_up(self) -> bool:
        """Whether the first step of a trial says that no tree can pay. Level 1 then rests."""
        return self._trials is not None and self._stepped and self._trials.too_dear(self.costs.of_step(1))

    def has_time(self, tokens: int) -> bool:
        """Whether a step of that many tokens would still be hidden by the pass that is under way."""
        if not self._stepped:
            return False
        cost, slack = self.step_cost(tokens), self.costs.slack
        return cost <= LATE * slack.longest and self._hidden + cost <= slack.spare

    @property
    def known(self) -> bool:
        """Whether there is anything to go by."""
        return bool(self._rounds)

    @property
    def value(self) -> float:
        """What a token is worth: what one costs at the pace of the last rounds."""
        tokens, costs = zip(*self._rounds, strict=True)
        return self.costs.mean(costs) * len(costs) / sum(tokens)

    def step_cost(self, tokens: int) -> float:
        """What a step of that many tokens costs."""
        return self.costs.of_step(tokens)

    @property
    def least_in_step(self) -> float:
        """How likely a draft token has to be accepted, for reading it in a step that is made anyway to pay."""
        return self.costs.least_in_step(self.value if self.known else None)

    @property
    def least_in_pass(self) -> float:
        """The same for reading it in a pass."""
        return self.costs.least_in_pass(self.value if self.known else None)
