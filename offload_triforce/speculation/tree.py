"""A tree of draft tokens behind a text. Its root is the newest token of the text, which is no draft token."""

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
        """Which of a few kinds of candidate this one is, by how sure the level is of it. Known before ``token`` is."""


class Node:
    """A draft token in the tree.

    Attributes:
        parent: None for the root. depth: 0 for the root.
        path_probability: estimated probability that all of its path is accepted: that the text goes on this way.
        candidates: what may follow, once the level that grows the tree has read this token.
        children: draft tokens that follow, in the order of their rank.
        known: nodes by token that have been read as followers of this one, whether they are draft tokens or not.
        state: of forkable logits processors, at the place after this token.
    """

    __slots__ = ("candidates", "children", "depth", "known", "parent", "path_probability", "state", "token")

    def __init__(self, token: int, parent: Node | None, path_probability: float = 1.0) -> None:
        self.token, self.parent, self.path_probability = token, parent, path_probability
        self.depth = 0 if parent is None else parent.depth + 1
        self.candidates: Candidates | None = None
        self.children: list[Node] = []
        self.known: dict[int, Node] = {}
        self.state = PathState(None if parent is None else parent.state)

    def child(self, token: int) -> Node:
        """The node of a token that follows; a new one if it is not known."""
        if token not in self.known:
            self.known[token] = Node(token, self)
        return self.known[token]

    def path(self) -> list[Node]:
        """From the root to this node, both included."""
        nodes, node = [], self
        while node is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


class TokenTree:
    """The draft tokens, in the order in which they were made. ``held``: what the level that grows the tree has read of
    it, in the order of its cache; some of it may have turned out not to be a draft token.
    """

    def __init__(self, root: Node) -> None:
        self.root = root
        self.draft_tokens: list[Node] = []
        self.held: list[Node] = []

    @classmethod
    def at_end(cls, text: TokenText) -> TokenTree:
        """Nothing but the text's newest token."""
        return cls(Node(text[-1:][0], None))

    def add(self, parent: Node, token: int, path_probability: float) -> Node:
        """Make a token a draft token, as the next child of its parent."""
        node = parent.child(token)
        node.path_probability = path_probability
        parent.children.append(node)
        self.draft_tokens.append(node)
        return node

    def moved_to(self, node: Node) -> TokenTree:
        """The tree below one of its nodes, which becomes the root. This tree must not be used any more."""
        inside = {node}
        tree = TokenTree(node)
        for other in self.draft_tokens:
            if other.parent in inside and other is not node:
                inside.add(other)
                tree.draft_tokens.append(other)
        for other in self.held:
            # What is no draft token, but known, stays as well: it may become one.
            if other in inside or other.parent in inside:
                inside.add(other)
                tree.held.append(other)
        scale = node.path_probability or 1.0
        base, node.parent = node.depth, None
        node.state.before = None  # by now the target has been there itself
        for other in inside:
            other.depth -= base
            other.path_probability = min(1.0, other.path_probability / scale)
        node.path_probability = 1.0
        return tree


def chain(tokens: Sequence[int]) -> list[Node]:
    """Tokens as nodes, each the child of the one before."""
    nodes: list[Node] = []
    for token in tokens:
        nodes.append(Node(token, nodes[-1] if nodes else None))
    return nodes


def tokens_of(nodes: Iterable[Node]) -> list[int]:
    """Their tokens."""
    return [node.token for node in nodes]


def prefix_of(text: TokenText, node: Node, device: torch.device) -> Tensor:
    """The text up to a node as a tensor on a device, (n + depth,): the root is the text's own last token."""
    ids, line = text.ids_on(device), node.path()[1:]
    if not line:
        return ids
    return torch.cat([ids, to_device(torch.tensor(tokens_of(line), dtype=torch.long), device)])


def tree_mask(nodes: Sequence[Node], before: Sequence[Node] = ()) -> np.ndarray:
    """The tree mask, bool [T, M + T]: whether each of the T ``nodes`` sees the M ``before``, and the T themselves.

    A node sees itself and its ancestors.
    """
    column = {node: i for i, node in enumerate([*before, *nodes])}
    seen = np.zeros((len(nodes), len(column)), dtype=bool)
    for row, node in enumerate(nodes):
        parent = column.get(node.parent)
        if parent is not None and parent >= len(before):
            seen[row] = seen[parent - len(before)]  # parents come first
        else:
            for other in ancestors(node.parent):
                if other in column:
                    seen[row, column[other]] = True
        seen[row, column[node]] = True
    return seen


def ancestors(node: Node | None) -> Iterator[Node]:
    """A node and its ancestors, upwards."""
    while node is not None:
        yield node
        node = node.parent
