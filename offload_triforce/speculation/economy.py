"""What guessing costs and what it brings, found out on the way: how far to guess follows from both."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

import numpy as np

from offload_triforce.scheduler.pipeline import Slack
from offload_triforce.speculation.tree import Candidates

# Odds that a candidate is what the target takes, by rank and kind (see ``rules``). Where measurement begins.
PRIOR_WEIGHT = 12.0
# So many rounds of the past count.
ROUNDS = 16
SAMPLES = 48
# A step may take so many times as long as the link goes on beside it: that holds the pass up by less than it spares.
LATE = 1.25


class History:
    """How often a candidate of a rank and kind was what the target took."""

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


class Costs:
    """Seconds that something takes, as a straight line over its number of tokens: the median of what was seen."""

    def __init__(self) -> None:
        self._seen: deque[tuple[int, float]] = deque(maxlen=SAMPLES)
        self._line: tuple[float, float] | None = None

    def add(self, tokens: int, seconds: float) -> None:
        """It took that long."""
        self._seen.append((tokens, seconds))
        self._line = None

    def __bool__(self) -> bool:
        return bool(self._seen)

    def at(self, tokens: int) -> float:
        """Seconds for that many tokens."""
        if self._line is None:
            self._line = self._fit()
        return max(0.0, self._line[0] + self._line[1] * tokens)

    @property
    def tells_sizes_apart(self) -> bool:
        """Whether more than one number of tokens has been seen."""
        return len({tokens for tokens, _ in self._seen}) > 1

    @property
    def per_token(self) -> float:
        """Seconds that one more token takes."""
        return self.at(2) - self.at(1)

    def _fit(self) -> tuple[float, float]:
        """Theil and Sen's estimator: the median of all slopes. A few slow outliers do not move it."""
        x, y = np.array(self._seen).T
        i, j = np.triu_indices(len(x), 1)
        apart = x[i] != x[j]
        slopes = (y[j] - y[i])[apart] / (x[j] - x[i])[apart]
        slope = max(0.0, float(np.median(slopes))) if len(slopes) else 0.0
        return float(np.median(y - slope * x)), slope


class Pace:
    """Tokens per second, and what steps and passes cost: measured, or as given."""

    def __init__(self, draft_cost: float | None = None) -> None:
        """``draft_cost``: what a step of the retrieval level costs, in passes; None measures both."""
        self.draft_cost = draft_cost
        self.steps, self.passes = Costs(), Costs()
        self._rounds: deque[tuple[int, float]] = deque(maxlen=ROUNDS)
        self._spent = self._hidden = 0.0
        self._slack = Slack() if draft_cost is None else Slack(1.0, math.inf)

    def step(self, tokens: int, seconds: float, drafting: float, hidden: bool) -> None:
        """A step of the retrieval level was made, after a draft had taken its time.

        ``hidden``: while something else was waited for.
        """
        self.steps.add(tokens, seconds)
        cost = seconds + drafting if self.draft_cost is None else self.draft_cost
        if hidden:
            self._hidden += cost
        else:
            self._spent += cost

    def round(self, nodes: int, seconds: float, new_tokens: int, slack: Slack) -> None:
        """A pass over that many nodes ended a round, which brought that many tokens. ``slack``: of that pass."""
        self.passes.add(nodes, seconds)
        self._rounds.append((new_tokens, self._spent + (seconds if self.draft_cost is None else 1.0)))
        if self.draft_cost is None:
            self._slack = slack
        self._spent = self._hidden = 0.0

    def has_time(self, tokens: int) -> bool:
        """Whether a step of that many tokens would still be hidden by the pass that is under way."""
        if not self.steps:
            return False
        cost = self.step_cost(tokens)
        return cost <= LATE * self._slack.longest and self._hidden + cost <= self._slack.spare

    @property
    def known(self) -> bool:
        """Whether there is anything to go by."""
        return bool(self._rounds)

    @property
    def value(self) -> float:
        """What a token is worth, in seconds (or passes): what one takes at the pace of the last rounds."""
        tokens, seconds = zip(*self._rounds, strict=True)
        # By the clock, the first rounds are no measure: kernels are compiled and graphs captured in them.
        mean = statistics.median(seconds) if self.draft_cost is None else statistics.fmean(seconds)
        return mean * len(seconds) / sum(tokens)

    def step_cost(self, tokens: int) -> float:
        """What a step of that many tokens costs."""
        return self.draft_cost if self.draft_cost is not None else self.steps.at(tokens)

    @property
    def least_in_step(self) -> float:
        """How likely a guess has to be reached, for reading it in a step that is made anyway to pay."""
        return self._least(self.steps)

    @property
    def least_in_pass(self) -> float:
        """The same for reading it in a pass."""
        return self._least(self.passes if self.passes.tells_sizes_apart else self.steps)

    def _least(self, costs: Costs) -> float:
        if self.draft_cost is not None or not self.steps:
            return 0.0
        # Before the first pass, nobody knows what a token is worth: not less than the step that guesses it.
        value = self.value if self.known else self.steps.at(1)
        return costs.per_token / value if value > 0 else 0.0
