"""Whether the steps of level 1 pay at all, where that is not known: it rests, and is tried now and then.

A step of level 1 reads all weights once. Where a pass hardly costs more than that, as on a CPU that attends to a text
in its own memory, no tree is worth its steps.
"""

from __future__ import annotations

from collections import deque

# Rounds of the past that count.
ROUNDS = 16
# A step of level 1 may cost this share of what a token costs without it: a tree takes several, and not each brings one.
SHARE = 0.5
# A trial may lose this share of the time since the last one.
LOSS = 0.03
# New tokens before level 1 is tried; after each trial that failed, so many times as many.
REST, LONGER = 32, 4


class Trials:
    """Whether level 1 drafts, by what a token has cost with it and without it.

    Attributes:
        resting: it makes no steps for now. It begins so: without it, drafting costs nothing.
    """

    def __init__(self) -> None:
        self.resting = True
        self._bare: deque[tuple[int, float]] = deque(maxlen=ROUNDS)  # rounds without level 1: tokens and cost
        self._tree: deque[tuple[int, float]] = deque(maxlen=ROUNDS)
        self._rest, self._rested, self._spent = REST, 0, 0.0
        self._broken = False  # whether this round's trial was given up after a step

    def begin(self) -> None:
        """A round begins: after a rest, level 1 is tried."""
        if self.resting and self._rested >= self._rest:
            self.resting = False
            self._tree.clear()

    def too_dear(self, step: float) -> bool:
        """Whether no tree can pay, as a step over one token costs so much. Then level 1 rests.

        Asked after the first step of a trial: so it costs no more than that.
        """
        if self._tree or step < SHARE * _pace(self._bare):
            return False
        self._rest_again()
        self._broken = True
        return True

    def round(self, new_tokens: int, cost: float) -> None:
        """A round brought so many tokens at that cost."""
        if self._broken:
            self._broken = False  # neither with level 1 nor without
        elif self.resting:
            self._bare.append((new_tokens, cost))
            self._rested += new_tokens
            self._spent += cost
        else:
            self._tree.append((new_tokens, cost))
            tokens, costs = zip(*self._tree, strict=True)
            if sum(costs) - sum(tokens) * _pace(self._bare) > LOSS * self._spent:
                self._rest_again()

    def _rest_again(self) -> None:
        self.resting, self._rested, self._spent = True, 0, 0.0
        self._rest *= LONGER


def _pace(rounds: deque[tuple[int, float]]) -> float:
    """Cost per token; the dearest round is left out where there are enough of them."""
    costs = sorted(rounds, key=lambda one: one[1])
    counted = costs[:-1] if len(costs) >= 4 else costs
    return sum(cost for _, cost in counted) / sum(tokens for tokens, _ in counted)
