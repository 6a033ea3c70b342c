"""Level 1 grows a tree of guesses: step by step, where it is likeliest to be right, as long as that pays."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from offload_triforce.scheduler.pipeline import Slack
from offload_triforce.speculation.drafting import Drafting
from offload_triforce.speculation.economy import History, Pace
from offload_triforce.speculation.rules import Guess, Rule, place_after
from offload_triforce.speculation.text import TokenText
from offload_triforce.speculation.tree import Node, TokenTree, tokens_of
from offload_triforce.stats import DecodeStats


class Level(Protocol):
    """A model that reads a tree bit by bit, and remembers what it has read."""

    def score(self, nodes: Sequence[Node], before: Sequence[Node]) -> Tensor:
        """Read T nodes: the logits after each, [T, V]. ``before``: those read already, in order."""

    def keep(self, kept: Sequence[int]) -> None:
        """Forget what has been read, but for these (numbers in the order of reading)."""


class Limits(NamedTuple):
    """How large a tree may become.

    Attributes:
        depth: guesses along a path. nodes: guesses for a pass. branches: guesses for one place.
        width: guesses that a step reads, those of the draft apart. room: tokens that the level can hold.
        adaptive: whether it is grown only as long as that pays.
        ahead: whether it is grown on while a pass is under way.
    """

    depth: int
    nodes: int
    branches: int
    width: int
    room: int
    adaptive: bool
    ahead: bool


# A guess that is less likely than this to be reached is not made, beside the best one of a place.
LEAST_REACH = 1 / 512
# Steps before it is known what a pass brings; and what one costs, where that is measured: it may be less than these
# steps, and somebody waits for the first token.
FIRST_STEPS = 12
FIRST_MEASURED = 4


class Middle:
    """The level between: its tree is what the target judges, made with the help of a draft."""

    def __init__(
        self,
        level: Level,
        drafting: Drafting,
        rule: Rule,
        limits: Limits,
        history: History,
        pace: Pace,
        ended: Callable[[int], bool],
        stats: DecodeStats,
    ) -> None:
        """``ended``: is there nothing to say after this token?"""
        self.level, self.drafting, self.rule, self.limits = level, drafting, rule, limits
        self.history, self.pace, self.ended, self.stats = history, pace, ended, stats
        self._tree: TokenTree | None = None
        self._text: TokenText | None = None
        self._deepest = self._most = 0  # how far guesses may go for now, and how many there may be

    def propose(self, text: TokenText, limit: int) -> list[Node]:
        """Grow the tree at the end of ``text`` and pick what the target is to judge, parents first.

        ``limit``: tokens that may follow.
        """
        if self._tree is None:
            self._tree = TokenTree.at_end(text)
        self._text, self._deepest, self._most = text, min(limit, self.limits.depth), self.limits.nodes
        steps = 0
        while self._wanted(steps) and self._step(hidden=False):
            steps += 1
        block = self._pick()
        self._deepest, self._most = min(limit, 2 * self.limits.depth), 2 * self.limits.nodes
        while self.pace.draft_cost is not None and self.go_on():
            pass  # what has time by the given cost, not by the clock, goes on at once
        return block

    def go_on(self) -> bool:
        """Make another step, if there is time: behind the guesses that are being judged, and beside them."""
        return self.limits.ahead and self.pace.has_time(self.limits.width) and self._step(hidden=True)

    def passed(self, nodes: int, seconds: float, new_tokens: int, slack: Slack) -> None:
        """A pass over that many nodes took so long, brought so many tokens, and left time for other things."""
        self.pace.round(nodes, seconds, new_tokens, slack)

    def learn(self, node: Node, taken: int) -> None:
        """The target took token ``taken`` after a node of the tree."""
        if node.candidates is not None:
            self.history.learn(node.candidates, taken)

    def move_to(self, node: Node, token: int) -> None:
        """The text now ends with ``token`` after a node of the tree: keep what was guessed to follow that."""
        tree, end = self._tree, node.known.get(token)
        if end is None:
            self._tree = None
            self.level.keep([])
            return
        place = {held: number for number, held in enumerate(tree.held)}
        self._tree = tree.moved_to(end)
        self.level.keep([place[held] for held in self._tree.held])

    def _wanted(self, steps: int) -> bool:
        """Whether another step pays: what it is expected to add to what is accepted, against what it costs."""
        limits, tree = self.limits, self._tree
        if not limits.adaptive:
            return len(tree.guesses) < limits.nodes
        if not self.pace.known:
            return steps < (FIRST_MEASURED if self.pace.draft_cost is None else FIRST_STEPS)
        leaves = self._leaves()
        gain = sum(leaf.reach for leaf in leaves)
        return bool(leaves) and gain > self.pace.step_cost(len(leaves)) / self.pace.value

    def _leaves(self) -> list[Node]:
        """The unread guesses that are likeliest to be reached, as many as a step reads.

        Where all guesses there may be are likelier than a leaf, so are they than what would follow it.
        """
        tree, width = self._tree, min(self.limits.width, self.limits.room - len(self._tree.held))
        if tree.root.candidates is None:
            return [tree.root][: min(width, self._deepest)]
        least = self.pace.least_in_step if self.limits.adaptive else 0.0
        if len(tree.guesses) >= self._most:
            least = max(least, heapq.nlargest(self._most, (node.reach for node in tree.guesses))[-1])
        unread = (
            node
            for node in tree.guesses
            if node.candidates is None
            and node.depth < self._deepest
            and node.reach > least
            and not self.ended(node.token)
        )
        return heapq.nlargest(width, unread, key=lambda node: node.reach)

    def _step(self, hidden: bool) -> bool:
        """Read the likeliest leaves, and make guesses behind them. False if there is nothing left to read."""
        leaves = self._leaves()
        if not leaves:
            return False
        started = time.perf_counter()
        tree, text = self._tree, self._text
        guesses = self._ask_draft(leaves)
        drafted = time.perf_counter()
        line = [leaves[0]]
        for guess in guesses:
            line.append(line[-1].follower(guess.token))
        nodes = [*leaves, *line[1:]]
        logits = self.level.score(nodes, tree.held)
        tree.held += nodes
        of_draft: dict[Node, Guess] = dict(zip(line, guesses, strict=False))
        candidates = self.rule.candidates(
            logits, [place_after(text, node) for node in nodes], [of_draft.get(node) for node in nodes]
        )
        for node, found in zip(nodes, candidates, strict=True):
            node.candidates = found
        for leaf in leaves:
            self._guess_after(leaf)
        if guesses:
            self._judge_draft(line, len(guesses))
        ended = time.perf_counter()
        self.pace.step(len(nodes), ended - drafted, drafted - started, hidden)
        self.stats.add_step(len(nodes), ended - started, hidden)
        return True

    def _ask_draft(self, leaves: list[Node]) -> list[Guess]:
        """Guesses of the draft behind the likeliest leaf."""
        leaf, limits = leaves[0], self.limits
        count = min(min(self._deepest, limits.depth) - 1 - leaf.depth, limits.room - len(self._tree.held) - len(leaves))
        if leaf.known:  # it has been read further already
            return []
        text, start = self._text, len(self._text)
        text.append(tokens_of(leaf.line()[1:]))
        known = self.pace.known
        cost = (lambda more: self.pace.step_cost(len(leaves) + more)) if known else None
        guesses = self.drafting.guess(text, count, cost, leaf.state.before)
        text.truncate(start)
        return guesses

    def _guess_after(self, node: Node) -> None:
        """Make guesses of a node's candidates; and behind those, where the draft has been there before."""
        for rank in range(min(self.limits.branches, self.history.ranks)):
            reach = node.reach * self.history.chance(node.candidates, rank)
            if rank and reach < LEAST_REACH:
                return
            token = node.candidates.token(rank)
            if token is None:
                return
            child = self._tree.guess(node, token, reach)
            if child.candidates is not None:
                self._guess_after(child)

    def _judge_draft(self, line: list[Node], proposed: int) -> None:
        """Count which of the draft's guesses came first, and forget those at the end that nobody wants."""
        accepted = 0
        for parent, node in itertools.pairwise(line):
            if not parent.children or parent.children[0] is not node:
                break
            accepted += 1
        self.drafting.learn(proposed, accepted)
        self.stats.draft.add(proposed, accepted)
        tree, count = self._tree, len(self._tree.held)
        while count and tree.held[count - 1] is not tree.root and not is_guess(tree.held[count - 1]):
            count -= 1
        if count < len(tree.held):
            for node in tree.held[count:]:
                del node.parent.known[node.token]
            del tree.held[count:]
            self.level.keep(range(count))

    def _pick(self) -> list[Node]:
        """The root, and the likeliest guesses in the order in which they were made: what the target reads."""
        limits, guesses = self.limits, self._tree.guesses
        floor = self.pace.least_in_pass if limits.adaptive else 0.0
        order = {node: number for number, node in enumerate(guesses) if node.depth <= self._deepest}
        best = heapq.nlargest(limits.nodes, order, key=lambda node: (node.reach, -order[node]))
        return [self._tree.root, *sorted((node for node in best if node.reach >= floor), key=order.__getitem__)]


def is_guess(node: Node) -> bool:
    """Whether a node is among its parent's guesses."""
    return node in node.parent.children
