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
from offload_triforce.speculation.place import Place
from offload_triforce.speculation.rules import Rule
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
        """Accept these of the tokens read (their numbers, ascending), and forget the others; all, if there are none."""


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
    stop: Callable[[TokenText], bool],
) -> Iterator[list[int]]:
    """Decode up to ``limit`` tokens; yields the new ones after each pass of the target.

    Args:
        target: the authority. middle: whoever guesses for it.
        rule: how guesses are judged.
        text: prompt in, everything out.
        limit: most new tokens.
        stats: what is counted.
        stop: asked after each token: does the text end with it?
    """
    end = len(text) + limit
    while len(text) < end:
        start = len(text)
        nodes = middle.propose(text, end - start - 1)
        started = time.perf_counter()
        nodes, logits = read(target, nodes, middle, stats)
        path, ended, failure = [], False, None
        try:
            for node in walk(nodes, logits, rule, text, middle):
                path.append(node)
                ended = stop(text)
                if ended:
                    break
        except Exception as error:  # of a processor or a criterion: what came before it is good, and comes out first
            if not path:
                raise
            failure = error
        place, token = {node: number for number, node in enumerate(nodes)}, text[-1:][0]
        middle.move_to(path[-1], token)
        target.commit([place[node] for node in path])
        right = path[-1].known.get(token) in place  # the text ended before anybody asked what follows that draft token
        rejected = not right and any(node.parent is path[-1] for node in nodes)
        stats.add_pass(len(nodes) - 1, len(path) - 1 + right, rejected, len(text) - start)
        middle.passed(len(nodes), time.perf_counter() - started, len(text) - start, target.slack())
        yield text[start:]
        if failure is not None:
            raise failure
        if ended:
            return


def read(target: Target, nodes: list[Node], middle: Proposer, stats: DecodeStats) -> tuple[list[Node], Tensor]:
    """A pass over the root and its draft tokens: what was read, and the logits after each, [T, V].

    Keys or values that are no numbers (NaN) spoil the whole pass, even where nobody attends to them. They may be a
    draft token's, and the text itself without any: so the root is read again, alone.
    """
    logits = target.score(nodes, middle.go_on)
    if len(nodes) == 1 or not bool(logits.isnan().any()):
        return nodes, logits
    target.commit([])
    stats.add_pass(len(nodes) - 1, 0, False, 0)
    return nodes[:1], target.score(nodes[:1], None)


def walk(nodes: Sequence[Node], logits: Tensor, rule: Rule, text: TokenText, middle: Proposer) -> Iterator[Node]:
    """Follow the target through the tree, from the root as far as the draft tokens are right.

    Yields each node on the way, once the text has got the target's token after it. The rule is asked about the text
    alone, place by place, and about none behind its end: this generator is then left where it is.

    ``logits`` [T, V] are those of the T ``nodes``.
    """
    rows = dict(zip(nodes, logits.split(1), strict=True))
    node: Node | None = nodes[0]
    while node in rows:
        token = rule.verdict(rows[node], Place(text.ids_on, len(text)), node.candidates, len(node.children))
        middle.learn(node, token)
        text.append([token])
        text.decide()
        yield node
        node = node.known.get(token)
