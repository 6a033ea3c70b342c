"""A tree of guesses at how a text goes on. Its root is the newest token of the text, which is no guess."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from offload_triforce.scheduler.device import to_device
from offload_triforce.speculation.place import PathState
from offload_triforce.speculation.text import TokenText


class Candidates(Protocol):
    """What a level thinks may follow a token, best first. ``tokens``: those that are known yet."""

    tokens: Sequence[int]

    def token(self, rank: int) -> int | None:
        """The candidate of that rank, from 0 on; None if there is none. Ranks are asked for in order."""

    def kind(self, rank: int) -> int:
        """Which of a few kinds of guess this one is, by how sure the level is of it. Known before ``token`` is."""


class Node:
    """One guess.

    Attributes:
        parent: None for the root. depth: 0 for the root.
        reach: estimated probability that the text goes on this way.
        candidates: what may follow, once the level that grows the tree has read this token.
        children: guesses that follow, in the order of their rank.
        known: nodes by token that have been read as followers of this one, whether they are guesses or not.
        state: of forkable logits processors, at the place after this token.
    """

    __slots__ = ("candidates", "children", "depth", "known", "parent", "reach", "state", "token")

    def __init__(self, token: int, parent: Node | None, reach: float = 1.0) -> None:
        self.token, self.parent, self.reach = token, parent, reach
        self.depth = 0 if parent is None else parent.depth + 1
        self.candidates: Candidates | None = None
        self.children: list[Node] = []
        self.known: dict[int, Node] = {}
        self.state = PathState(None if parent is None else parent.state)

    def follower(self, token: int) -> Node:
        """The node of a token that follows; a new one if it is not known."""
        if token not in self.known:
            self.known[token] = Node(token, self)
        return self.known[token]

    def line(self) -> list[Node]:
        """From the root to this node, both included."""
        nodes, node = [], self
        while node is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


class TokenTree:
    """The guesses, in the order in which they were made. ``held``: what the level that grows the tree has read of it,
    in the order of its cache; some of it may have turned out not to be a guess.
    """

    def __init__(self, root: Node) -> None:
        self.root = root
        self.guesses: list[Node] = []
        self.held: list[Node] = []

    @classmethod
    def at_end(cls, text: TokenText) -> TokenTree:
        """Nothing but the text's newest token."""
        return cls(Node(text[-1:][0], None))

    def guess(self, parent: Node, token: int, reach: float) -> Node:
        """Make a token a guess, as the next child of its parent."""
        node = parent.follower(token)
        node.reach = reach
        parent.children.append(node)
        self.guesses.append(node)
        return node

    def moved_to(self, node: Node) -> TokenTree:
        """The tree below one of its nodes, which becomes the root. This tree must not be used any more."""
        inside = {node}
        tree = TokenTree(node)
        for other in self.guesses:
            if other.parent in inside and other is not node:
                inside.add(other)
                tree.guesses.append(other)
        for other in self.held:
            # What is no guess, but known, stays as well: it may become one.
            if other in inside or other.parent in inside:
                inside.add(other)
                tree.held.append(other)
        scale = node.reach or 1.0
        base, node.parent = node.depth, None
        node.state.before = None  # by now the target has been there itself
        for other in inside:
            other.depth -= base
            other.reach = min(1.0, other.reach / scale)
        node.reach = 1.0
        return tree


def tokens_of(nodes: Iterable[Node]) -> list[int]:
    """Their tokens."""
    return [node.token for node in nodes]


def path_after(text: TokenText, node: Node) -> list[int]:
    """The text up to a node, [n + depth]: the root is the text's own last token."""
    return text[:] + tokens_of(node.line()[1:])


def prefix_of(text: TokenText, node: Node, device: torch.device) -> Tensor:
    """The same as a tensor on a device, (n + depth,)."""
    ids, line = text.ids_on(device), node.line()[1:]
    if not line:
        return ids
    return torch.cat([ids, to_device(torch.tensor(tokens_of(line), dtype=torch.long), device)])


def sight(nodes: Sequence[Node], before: Sequence[Node] = ()) -> np.ndarray:
    """Who sees whom: bool [T, M + T], whether each of the T ``nodes`` sees the M ``before``, and the T themselves.

    A node sees itself and what it follows.
    """
    column = {node: i for i, node in enumerate([*before, *nodes])}
    seen = np.zeros((len(nodes), len(column)), dtype=bool)
    for row, node in enumerate(nodes):
        parent = column.get(node.parent)
        if parent is not None and parent >= len(before):
            seen[row] = seen[parent - len(before)]  # parents come first
        else:
            for other in lineage(node.parent):
                if other in column:
                    seen[row, column[other]] = True
        seen[row, column[node]] = True
    return seen


def lineage(node: Node | None) -> Iterator[Node]:
    """A node and all that it follows, upwards."""
    while node is not None:
        yield node
        node = node.parent
