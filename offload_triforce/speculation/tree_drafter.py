"""Level 1 grows a tree of draft tokens: step by step, where it is likeliest to be right, as long as that pays."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from offload_triforce.scheduler.clock import Clock, Mark
from offload_triforce.scheduler.pipeline import Slack
from offload_triforce.speculation.acceptance import AcceptanceRule, DraftToken, place_after
from offload_triforce.speculation.adaptive import AcceptanceModel, DraftController
from offload_triforce.speculation.draft_selector import DraftSelector
from offload_triforce.speculation.growth import LEAST_PROBABILITY, step_size
from offload_triforce.speculation.stats import DecodeStats
from offload_triforce.speculation.text import TokenText
from offload_triforce.speculation.tree import Node, TokenTree, tokens_of


class Level(Protocol):
    """A model that reads a tree bit by bit, and remembers what it has read."""

    def score(self, nodes: Sequence[Node], before: Sequence[Node]) -> Tensor:
        """Read T nodes: the logits after each, [T, V]. ``before``: those read already, in order."""

    def keep(self, kept: Sequence[int]) -> None:
        """Forget what has been read, but for these (numbers in the order of reading)."""


class Limits(NamedTuple):
    """How large a tree may become.

    Attributes:
        depth: draft tokens along a path. nodes: draft tokens for a pass. topk: draft tokens for one place.
        width: draft tokens that a step reads, those of level 0 apart. room: tokens that the level can hold.
        adaptive: whether it is grown only as long as that pays.
        overlap: whether it is grown on while a pass is under way.
    """

    depth: int
    nodes: int
    topk: int
    width: int
    room: int
    adaptive: bool
    overlap: bool


class _Step(NamedTuple):
    """A step that was made over so many tokens: where it began, had its draft tokens, and ended."""

    tokens: int
    began: Mark
    asked: Mark
    ended: Mark
    hidden: bool


class TreeDrafter:
    """The tree drafter, level 1: with the help of a drafter, it grows the tree that the target verifies."""

    def __init__(
        self,
        level: Level,
        selector: DraftSelector,
        rule: AcceptanceRule,
        limits: Limits,
        acceptance: AcceptanceModel,
        controller: DraftController,
        ended: Callable[[int], bool],
        stats: DecodeStats,
        clock: Clock,
    ) -> None:
        """``ended``: is there nothing to say after this token? ``clock``: what steps are timed by."""
        self.level, self.selector, self.rule, self.limits = level, selector, rule, limits
        self.acceptance, self.controller, self.ended, self.stats = acceptance, controller, ended, stats
        self._clock = clock
        self._untold: list[_Step] = []  # whose times nobody has asked for yet: that may mean waiting
        self._tree: TokenTree | None = None
        self._text: TokenText | None = None
        self._deepest = self._most = 0  # how deep draft tokens may go for now, and how many there may be

    def propose(self, text: TokenText, limit: int) -> list[Node]:
        """Grow the tree at the end of ``text`` and pick what the target is to judge, parents first.

        ``limit``: tokens that may follow.
        """
        if self._tree is None:
            self._tree = TokenTree.at_end(text)
        self._text, self._deepest, self._most = text, min(limit, self.limits.depth), self.limits.nodes
        steps = 0
        while leaves := self._wanted(steps):
            self._step(leaves, hidden=False)
            steps += 1
        block = self._pick()
        self._deepest, self._most = min(limit, 2 * self.limits.depth), 2 * self.limits.nodes
        while not self.controller.costs.timed and self.go_on():
            pass  # what has time by the given cost, not by the clock, goes on at once
        return block

    def go_on(self) -> bool:
        """Make another step, if there is time: behind the draft tokens that are being judged, and beside them."""
        self._tell_times()
        if not self.limits.overlap or not self.controller.has_time(self.limits.width):
            return False
        leaves = self._leaves()
        if leaves:
            self._step(leaves, hidden=True)
        return bool(leaves)

    def passed(self, nodes: int, seconds: float, new_tokens: int, slack: Slack) -> None:
        """A pass over that many nodes took so long, brought so many tokens, and left time for other things."""
        self._tell_times()
        self.controller.round(nodes, seconds, new_tokens, slack)

    def learn(self, node: Node, taken: int) -> None:
        """The target took token ``taken`` after a node of the tree."""
        if node.candidates is not None:
            self.acceptance.learn(node.candidates, taken)
            self.stats.add_choice(node.candidates.tokens, taken)

    def move_to(self, node: Node, token: int) -> None:
        """The text now ends with ``token`` after a node of the tree: keep what was drafted to follow that."""
        tree, end = self._tree, node.known.get(token)
        if end is None:
            self.forget()
            return
        place = {held: number for number, held in enumerate(tree.held)}
        self._tree = tree.moved_to(end)
        self.level.keep([place[held] for held in self._tree.held])
        for held in [node for node in (self._tree.root, *self._tree.draft_tokens) if node.candidates is not None]:
            self._offer_after(held)  # what was too unlikely seen from the old root need not be so now

    def forget(self) -> None:
        """Nothing of what was drafted is of use any more."""
        self._tree = None
        self.level.keep([])

    def _wanted(self, steps: int) -> list[Node]:
        """The leaves for another step, if it pays: what it is expected to add to what is accepted, against its cost."""
        self._tell_times()
        limits, controller = self.limits, self.controller
        if not limits.adaptive:
            return self._leaves() if len(self._tree.draft_tokens) < limits.nodes else []
        if not controller.known:
            return self._leaves() if steps < controller.costs.first_steps else []
        if steps and controller.gives_up():
            return []
        leaves = self._leaves()
        gain = sum(leaf.path_probability for leaf in leaves)
        return leaves if leaves and gain > controller.step_cost(len(leaves)) / controller.value else []

    def _leaves(self) -> list[Node]:
        """The unread draft tokens of the greatest path probability, as many as a step reads.

        Where all draft tokens there may be are likelier than a leaf, so are they than what would follow it.
        """
        tree, width = self._tree, min(self.limits.width, self.limits.room - len(self._tree.held))
        if tree.root.candidates is None:
            return [tree.root][: min(width, self._deepest)]
        least = self.controller.least_in_step if self.limits.adaptive else 0.0
        if len(tree.draft_tokens) >= self._most:
            least = max(least, heapq.nlargest(self._most, (node.path_probability for node in tree.draft_tokens))[-1])
        unread = (
            node
            for node in tree.draft_tokens
            if node.candidates is None
            and node.depth < self._deepest
            and node.path_probability > least
            and not self.ended(node.token)
        )
        return heapq.nlargest(width, unread, key=lambda node: node.path_probability)

    def _step(self, leaves: list[Node], hidden: bool) -> None:
        """Read the likeliest leaves, and draft behind them."""
        began = self._clock.mark()
        tree, text = self._tree, self._text
        drafted = self._ask_draft(leaves)
        leaves = leaves[: max(1, step_size(len(leaves) + len(drafted)) - len(drafted))]
        asked = self._clock.mark()
        line = [leaves[0]]
        for draft_token in drafted:
            line.append(line[-1].child(draft_token.token))
        nodes = [*leaves, *line[1:]]
        logits = self.level.score(nodes, tree.held)
        tree.held += nodes
        of_draft: dict[Node, DraftToken] = dict(zip(line, drafted, strict=False))
        candidates = self.rule.candidates(
            logits, [place_after(text, node) for node in nodes], [of_draft.get(node) for node in nodes]
        )
        for node, found in zip(nodes, candidates, strict=True):
            node.candidates = found
        for leaf in leaves:
            self._offer_after(leaf)
        if drafted:
            self._judge_drafted(line, len(drafted))
        self._untold.append(_Step(len(nodes), began, asked, self._clock.mark(), hidden))

    def _tell_times(self) -> None:
        """Tell whoever counts how long the latest steps took. By now the device is through with them."""
        for step in self._untold:
            drafting, reading = step.asked.since(step.began), step.ended.since(step.asked)
            self.controller.step(step.tokens, reading, drafting, step.hidden)
            self.stats.add_step(step.tokens, drafting + reading, step.hidden)
        self._untold.clear()

    def _ask_draft(self, leaves: list[Node]) -> list[DraftToken]:
        """Draft tokens of level 0 behind the likeliest leaf."""
        leaf, limits = leaves[0], self.limits
        count = min(min(self._deepest, limits.depth) - 1 - leaf.depth, limits.room - len(self._tree.held) - len(leaves))
        if leaf.known:  # it has been read further already
            return []
        text, start = self._text, len(self._text)
        text.append(tokens_of(leaf.path()[1:]))
        known = self.controller.known
        cost = (lambda more: self.controller.step_cost(len(leaves) + more)) if known else None
        drafted = self.selector.draft(text, count, cost, leaf.state.before)
        text.truncate(start)
        return drafted

    def _offer_after(self, node: Node) -> None:
        """Make draft tokens of those candidates of a node that are none yet.

        And of what follows those, where level 0 has been there before.
        """
        for rank in range(len(node.children), min(self.limits.topk, self.acceptance.ranks)):
            path_probability = node.path_probability * self.acceptance.chance(node.candidates, rank)
            if rank and path_probability < LEAST_PROBABILITY:
                return
            token = node.candidates.token(rank)
            if token is None:
                return
            child = self._tree.add(node, token, path_probability)
            if child.candidates is not None:
                self._offer_after(child)

    def _judge_drafted(self, line: list[Node], proposed: int) -> None:
        """Count which of level 0's draft tokens came first, and forget those at the end that nobody wants."""
        accepted = 0
        for parent, node in itertools.pairwise(line):
            if not parent.children or parent.children[0] is not node:
                break
            accepted += 1
        self.selector.learn(proposed, accepted)
        self.stats.add_draft(self.selector.name, proposed, accepted)
        tree, count = self._tree, len(self._tree.held)
        while count and tree.held[count - 1] is not tree.root and not is_offered(tree.held[count - 1]):
            count -= 1
        if count < len(tree.held):
            for node in tree.held[count:]:
                del node.parent.known[node.token]
            del tree.held[count:]
            self.level.keep(range(count))

    def _pick(self) -> list[Node]:
        """The root, and the likeliest draft tokens in the order in which they were made: what the target reads."""
        limits, drafted = self.limits, self._tree.draft_tokens
        floor = self.controller.least_in_pass if limits.adaptive else 0.0
        order = {node: number for number, node in enumerate(drafted) if node.depth <= self._deepest}
        best = heapq.nlargest(limits.nodes, order, key=lambda node: (node.path_probability, -order[node]))
        return [
            self._tree.root,
            *sorted((node for node in best if node.path_probability >= floor), key=order.__getitem__),
        ]


def is_offered(node: Node) -> bool:
    """Whether a node is among its parent's draft tokens."""
    return node in node.parent.children
