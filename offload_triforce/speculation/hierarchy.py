"""The algorithm, on one page; everything else serves it.

    draft (L0)  ->  retrieval level (L1)  ->  target with the full cache (L2)

Level 1 grows a tree of draft tokens behind the text, with the help of a drafter that it judges itself; the target
reads all of it in one pass, and accepts draft tokens from the root on as far as they are right (``verify_tree``). Each
token on the way is the target's own, by a rule that makes it so whatever was drafted (``acceptance``). While the pass
streams, level 1 drafts ahead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from torch import Tensor

from offload_triforce.scheduler.pipeline import Slack
from offload_triforce.speculation.acceptance import AcceptanceRule
from offload_triforce.speculation.place import Place
from offload_triforce.speculation.sampling import Survey
from offload_triforce.speculation.stats import DecodeStats
from offload_triforce.speculation.text import TokenText
from offload_triforce.speculation.tree import Node


class Target(Protocol):
    """The level that has the last word."""

    def score(self, nodes: Sequence[Node], idle: Callable[[], object] | None) -> Tensor:
        """Read the root of a tree and some of its draft tokens, parents first: the logits after each, [T, V].

        ``idle`` is called whenever there is time for something else.
        """

    def slack(self) -> Slack:
        """What the last step, whose logits have been looked at, left time for."""

    def commit(self, kept: Sequence[int]) -> None:
        """Accept these of the tokens read (their numbers, ascending), and forget the others; all, if there are none."""


class Proposer(Protocol):
    """Whoever drafts for the target, in a tree."""

    def propose(self, text: TokenText, limit: int) -> list[Node]:
        """The text's newest token as the root, then draft tokens at most ``limit`` deep behind it, parents first."""

    def go_on(self) -> object:
        """Draft further while those are judged, if there is time."""

    def learn(self, node: Node, taken: int) -> None:
        """The target took token ``taken`` after a node."""

    def move_to(self, node: Node, token: int) -> None:
        """The text now ends with ``token`` after a node."""

    def passed(self, nodes: int, seconds: float, new_tokens: int, slack: Slack) -> None:
        """A pass over that many nodes took so long, brought so many tokens, and left time for other things."""


def decode(
    target: Target,
    tree_drafter: Proposer,
    rule: AcceptanceRule,
    text: TokenText,
    limit: int,
    stats: DecodeStats,
    stop: Callable[[TokenText], bool],
) -> Iterator[list[int]]:
    """Decode up to ``limit`` tokens; yields the new ones after each pass of the target.

    Args:
        target: the authority. tree_drafter: whoever drafts for it.
        rule: how draft tokens are judged.
        text: prompt in, everything out.
        limit: most new tokens.
        stats: what is counted.
        stop: asked after each token: does the text end with it?
    """
    end = len(text) + limit
    while len(text) < end:
        start = len(text)
        nodes = tree_drafter.propose(text, end - start - 1)
        started = time.perf_counter()
        nodes, logits, survey = read(target, nodes, rule, text, tree_drafter, stats)
        path, ended, failure = [], False, None
        try:
            for node in verify_tree(nodes, logits, survey, rule, text, tree_drafter):
                path.append(node)
                ended = stop(text)
                if ended:
                    break
        except Exception as error:  # of a processor or a criterion: what came before it is good, and comes out first
            if not path:
                raise
            failure = error
        place, token = {node: number for number, node in enumerate(nodes)}, text[-1:][0]
        # The drafter first: the commit moves all that is still drafted to where the text now ends, so what the verdict
        # has ruled out has to be gone by then. Times are told after it, as it is part of the round; and all of this
        # before the yield, since whoever reads may take long, or never come back.
        tree_drafter.move_to(path[-1], token)
        target.commit([place[node] for node in path])
        right = path[-1].known.get(token) in place  # the text ended before anybody asked what follows that draft token
        rejected = not right and any(node.parent is path[-1] for node in nodes)
        stats.add_pass(len(nodes) - 1, len(path) - 1 + right, rejected, len(text) - start)
        tree_drafter.passed(len(nodes), time.perf_counter() - started, len(text) - start, target.slack())
        yield text[start:]
        if failure is not None:
            raise failure
        if ended:
            return


def read(
    target: Target,
    nodes: list[Node],
    rule: AcceptanceRule,
    text: TokenText,
    tree_drafter: Proposer,
    stats: DecodeStats,
) -> tuple[list[Node], Tensor, Survey]:
    """A pass over the root and its draft tokens: what was read, the logits after each, [T, V], and what they say.

    Keys or values that are no numbers (NaN) spoil the whole pass, even where nobody attends to them. They may be a
    draft token's, and the text itself without any: so the root is read again, alone.
    """
    logits = target.score(nodes, tree_drafter.go_on)
    survey = rule.survey(logits, nodes, text)
    if len(nodes) == 1 or survey.sound:
        return nodes, logits, survey
    target.commit([])
    stats.add_pass(len(nodes) - 1, 0, False, 0)
    logits = target.score(nodes[:1], None)
    return nodes[:1], logits, rule.survey(logits, nodes[:1], text)


def verify_tree(
    nodes: Sequence[Node],
    logits: Tensor,
    survey: Survey,
    rule: AcceptanceRule,
    text: TokenText,
    tree_drafter: Proposer,
) -> Iterator[Node]:
    """Verify a tree of draft tokens: follow the target from the root, as far as they are right.

    Yields each node on the way, once the text has got the target's token after it. The rule is asked about the text
    alone, place by place, and about none behind its end: this generator is then left where it is.

    ``logits`` [T, V] are those of the T ``nodes``, and ``survey`` what is known of them.
    """
    rows = {node: number for number, node in enumerate(nodes)}
    node: Node | None = nodes[0]
    while (row := rows.get(node)) is not None:
        place, own = Place(text.ids_on, len(text)), logits[row : row + 1]
        token = rule.verdict(own, place, node.candidates, len(node.children), survey.rows[row])
        tree_drafter.learn(node, token)
        text.append([token])
        text.decide()
        yield node
        node = node.known.get(token)
