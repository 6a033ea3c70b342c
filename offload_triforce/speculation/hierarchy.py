"""The algorithm, on one page; everything else serves it.

    draft (L0)  ->  retrieval level (L1)  ->  target with the full cache (L2)

Level 1 grows a tree of guesses behind the text, with the help of a draft that it judges itself; the target reads all of
it in one pass, and walks from the root as far as the guesses are right. Each token on the way is the target's own,
by a rule that makes it so whatever was guessed (``rules``). While the pass streams, level 1 goes on guessing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from torch import Tensor

from offload_triforce.scheduler.pipeline import Slack
from offload_triforce.speculation.rules import Rule, place_after
from offload_triforce.speculation.text import TokenText
from offload_triforce.speculation.tree import Node
from offload_triforce.stats import DecodeStats


class Target(Protocol):
    """The level that has the last word."""

    def score(self, nodes: Sequence[Node], idle: Callable[[], object] | None) -> Tensor:
        """Read the root of a tree and some of its guesses, parents first: the logits after each, [T, V].

        ``idle`` is called whenever there is time for something else.
        """

    def slack(self) -> Slack:
        """What the last step, whose logits have been looked at, left time for."""

    def commit(self, kept: Sequence[int]) -> None:
        """Accept these of the tokens read (their numbers, ascending), and forget the others."""


class Proposer(Protocol):
    """Whoever guesses for the target, in a tree."""

    def propose(self, text: TokenText, limit: int) -> list[Node]:
        """The text's newest token as the root, then guesses of at most ``limit`` tokens behind it, parents first."""

    def go_on(self) -> object:
        """Guess further while those are judged, if there is time."""

    def learn(self, node: Node, taken: int) -> None:
        """The target took token ``taken`` after a node."""

    def move_to(self, node: Node, token: int) -> None:
        """The text now ends with ``token`` after a node."""

    def passed(self, nodes: int, seconds: float, new_tokens: int, slack: Slack) -> None:
        """A pass over that many nodes took so long, brought so many tokens, and left time for other things."""


def decode(
    target: Target,
    middle: Proposer,
    rule: Rule,
    text: TokenText,
    limit: int,
    stats: DecodeStats,
    stop: Callable[[TokenText, int], int | None],
) -> Iterator[list[int]]:
    """Decode up to ``limit`` tokens; yields the new ones after each pass of the target.

    Args:
        target: the authority. middle: whoever guesses for it.
        rule: how guesses are judged.
        text: prompt in, everything out.
        limit: most new tokens.
        stats: what is counted.
        stop: (text, length before the pass) -> length to cut the text to, or None to go on.
    """
    end = len(text) + limit
    while len(text) < end:
        start = len(text)
        nodes = middle.propose(text, end - start - 1)
        started = time.perf_counter()
        logits = target.score(nodes, middle.go_on)
        path, token = walk(nodes, logits, rule, text, middle)
        text.append([node.token for node in path[1:]] + [token])
        place = {node: number for number, node in enumerate(nodes)}
        middle.move_to(path[-1], token)
        target.commit([place[node] for node in path])
        text.decide()
        cut = stop(text, start)
        if cut is not None:
            text.truncate(cut)
        stats.add_pass(nodes, path, len(text) - start)
        middle.passed(len(nodes), time.perf_counter() - started, len(text) - start, target.slack())
        yield text[start:]
        if cut is not None:
            return


def walk(
    nodes: Sequence[Node], logits: Tensor, rule: Rule, text: TokenText, middle: Proposer
) -> tuple[list[Node], int]:
    """Follow the target through the tree: the accepted nodes from the root on, and the token after them.

    ``logits`` [T, V] are those of the T ``nodes``.
    """
    rows = dict(zip(nodes, logits.split(1), strict=True))
    path = [nodes[0]]
    while True:
        node = path[-1]
        token = rule.verdict(rows[node], place_after(text, node), node.candidates, len(node.children))
        middle.learn(node, token)
        child = node.known.get(token)
        if child not in rows:
            return path, token
        path.append(child)
