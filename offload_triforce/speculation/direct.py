"""Draft tokens of level 0 straight to the target, while level 1 rests.

What is accepted is the target's own token at each place, drawn without regard to what was drafted.
"""

from __future__ import annotations

from collections.abc import Callable

from offload_triforce.scheduler.pipeline import Slack
from offload_triforce.speculation.adaptive import DraftController
from offload_triforce.speculation.draft_selector import DraftSelector
from offload_triforce.speculation.stats import DecodeStats
from offload_triforce.speculation.text import TokenText
from offload_triforce.speculation.tree import Node, TokenTree
from offload_triforce.speculation.tree_drafter import TreeDrafter

# Most draft tokens of level 0 in a pass of its own.
MOST = 16


class DirectDrafter:
    """Drafts a chain for the target: what a selector of drafters offers."""

    def __init__(self, selector: DraftSelector, stats: DecodeStats) -> None:
        self._selector, self._stats = selector, stats
        self._proposed = 0
        self._most = 2  # draft tokens that a pass may have; it grows with what passes have been seen to cost

    def propose(self, text: TokenText, limit: int, pass_cost: Callable[[int], float] | None) -> list[Node]:
        """The text's newest token as the root, and at most ``limit`` draft tokens behind it.

        ``pass_cost``: what a pass over that many tokens costs; None if no pass has been seen yet: nothing is drafted.
        """
        tree, self._proposed = TokenTree.at_end(text), 0
        if pass_cost is not None:
            room = min(limit, self._most, MOST)
            drafted = self._selector.draft(text, room, lambda more: pass_cost(1 + more), tree.root.state.before)
            node = tree.root
            for token in drafted:
                node = tree.add(node, token.token, node.path_probability)
            self._proposed = len(drafted)
        return [tree.root, *tree.draft_tokens]

    def judged(self, accepted: int) -> None:
        """The target accepted so many of the latest draft tokens."""
        if self._proposed:
            self._selector.learn(self._proposed, accepted)
            self._stats.add_draft(self._selector.name, self._proposed, accepted)
            self._most = max(self._most, 2 * self._proposed)


class RestingDrafter:
    """Round by round, the tree drafter or, while that rests, the direct one: a ``Proposer`` like either."""

    def __init__(self, tree_drafter: TreeDrafter, direct: DirectDrafter) -> None:
        """Whether it rests is what the ``tree_drafter``'s controller says."""
        self.tree_drafter, self._direct = tree_drafter, direct
        self._directly = False  # whether this round was drafted without level 1

    @property
    def controller(self) -> DraftController:
        """What decides whether level 1 rests."""
        return self.tree_drafter.controller

    def propose(self, text: TokenText, limit: int) -> list[Node]:
        """See ``Proposer``. It is settled who drafts."""
        self.controller.begin_round()
        self._directly = self.controller.rests
        if not self._directly:
            return self.tree_drafter.propose(text, limit)
        self.tree_drafter.forget()
        pass_cost = self.controller.costs.of_pass if self.controller.known else None
        return self._direct.propose(text, min(limit, self.tree_drafter.limits.depth), pass_cost)

    def go_on(self) -> bool:
        """See ``Proposer``."""
        return not self._directly and self.tree_drafter.go_on()

    def learn(self, node: Node, taken: int) -> None:
        """See ``Proposer``. Level 1 learns nothing from draft tokens that it has not seen."""
        if not self._directly:
            self.tree_drafter.learn(node, taken)

    def move_to(self, node: Node, token: int) -> None:
        """See ``Proposer``."""
        if self._directly:
            self._direct.judged(node.depth + (token in node.known))
        else:
            self.tree_drafter.move_to(node, token)

    def passed(self, nodes: int, seconds: float, new_tokens: int, slack: Slack) -> None:
        """See ``Proposer``."""
        self.tree_drafter.passed(nodes, seconds, new_tokens, slack)
