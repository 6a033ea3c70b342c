"""Draft tokens of level 0 straight to the target, where steps of level 1 do not pay: when to, and how many.

A step of level 1 reads all weights once. Where a pass hardly costs more than that, as on a CPU that attends to a short
text in its own memory, no tree is worth its steps: look-up, which costs nothing, then drafts for the target itself.
What is accepted is the target's own token at each place, drawn without regard to what was drafted.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable

from offload_triforce.speculation.draft_selector import DraftSelector
from offload_triforce.speculation.stats import DecodeStats
from offload_triforce.speculation.text import TokenText
from offload_triforce.speculation.tree import TokenTree

# Most draft tokens of level 0 in a pass of its own.
MOST = 16
# Rounds of the past that count.
ROUNDS = 16
# Rounds after which trees are judged: at first, as kernels are compiled in those, and where level 1 is tried again.
FIRST, TRIAL = 6, 2
# New tokens before level 1 is tried; after each try that failed, so many times as many.
REST, LONGER = 32, 4


class DirectDrafter:
    """Drafts for the target what a selector of drafters offers."""

    def __init__(self, selector: DraftSelector, stats: DecodeStats) -> None:
        self._selector, self._stats = selector, stats
        self._proposed = 0
        self._most = 2  # draft tokens that a pass may have; it grows with what passes have been seen to cost

    def draft(self, tree: TokenTree, text: TokenText, limit: int, pass_cost: Callable[[int], float] | None) -> None:
        """Add a chain of draft tokens to a tree that has only its root: at most ``limit``.

        ``pass_cost``: what a pass over that many tokens costs; None if no pass has been seen yet: nothing is drafted.
        """
        self._proposed = 0
        if pass_cost is None:
            return
        room = min(limit, self._most, MOST)
        drafted = self._selector.draft(text, room, lambda more: pass_cost(1 + more), tree.root.state.before)
        node = tree.root
        for token in drafted:
            node = tree.add(node, token.token, node.path_probability)
        self._proposed = len(drafted)

    def judged(self, accepted: int) -> None:
        """The target accepted so many of the latest draft tokens."""
        if self._proposed:
            self._selector.learn(self._proposed, accepted)
            self._stats.add_draft(self._selector.name, self._proposed, accepted)
            self._most = max(self._most, 2 * self._proposed)


class WayChooser:
    """Whether level 1 drafts, by what a token has cost with it and without it.

    Attributes:
        lean: it rests.
    """

    def __init__(self, lean: bool) -> None:
        """``lean``: whether it rests at first."""
        self.lean = lean
        self._bare: deque[tuple[int, float]] = deque(maxlen=ROUNDS)  # rounds without level 1: tokens and cost
        self._tree: deque[tuple[int, float]] = deque(maxlen=ROUNDS)
        self._rest, self._rested = REST, 0

    def begin(self) -> None:
        """A round begins: after a rest, level 1 is tried."""
        if self.lean and self._rested >= self._rest:
            self.lean = False
            self._tree.clear()

    def too_dear(self, step: float, per_token: float) -> bool:
        """Whether no tree can pay, as a step over one token and that token in a pass cost so much. Then level 1 rests.

        Asked after the first step of a trial: so it costs no more than that.
        """
        if self._tree or not self._bare or step + per_token < _pace(self._bare):
            return False
        self._go_lean()
        return True

    def round(self, new_tokens: int, cost: float, least_pass: float) -> None:
        """A round brought so many tokens at that cost. ``least_pass``: what a pass over one token costs."""
        if self.lean:
            self._bare.append((new_tokens, cost))
            self._rested += new_tokens
            return
        self._tree.append((new_tokens, cost))
        without = min(_pace(self._bare), least_pass) if self._bare else least_pass
        tokens, costs = zip(*self._tree, strict=True)  # the median: graphs are captured in the first rounds
        if (
            len(costs) >= (TRIAL if self._bare else FIRST)
            and statistics.median(costs) * len(costs) / sum(tokens) > without
        ):
            self._go_lean()

    def _go_lean(self) -> None:
        self.lean, self._rested = True, 0
        self._rest *= LONGER if self._bare else 1


def _pace(rounds: deque[tuple[int, float]]) -> float:
    """Cost per token; the dearest round is left out where there are enough of them."""
    costs = sorted(rounds, key=lambda one: one[1])
    counted = costs[:-1] if len(costs) >= 4 else costs
    return sum(cost for _, cost in counted) / sum(tokens for tokens, _ in counted)
