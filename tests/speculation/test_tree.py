"""Trees of draft tokens: who sees whom, and what is left when the text moves on."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload_triforce.speculation.text import TokenText
from offload_triforce.speculation.tree import Node, TokenTree, ancestors, prefix_of, tokens_of, tree_mask
from tests.speculation.toys import path_after

CPU = torch.device("cpu")


def text_of(*tokens):
    return TokenText(torch.tensor(tokens), len(tokens) + 20)


@st.composite
def trees(draw):
    """A tree, with some nodes read that are no draft tokens."""
    tree = TokenTree(Node(0, None))
    nodes = [tree.root]
    for _ in range(draw(st.integers(0, 14))):
        parent = nodes[draw(st.integers(0, len(nodes) - 1))]
        token = draw(st.integers(1, 4))
        if token in parent.known:
            continue
        draft_token = parent is tree.root or parent in tree.draft_tokens
        if draft_token and draw(st.booleans()):
            nodes.append(tree.add(parent, token, parent.path_probability * 0.5))
        else:
            nodes.append(parent.child(token))
    read = [node for node in nodes if draw(st.booleans()) or node is tree.root]
    tree.held = [node for node in read if all(up in read for up in ancestors(node))]
    return tree, nodes


@given(trees())
def test_a_node_sees_itself_and_what_it_follows(made):
    _, nodes = made
    for split in (0, len(nodes) // 2):
        before, after = nodes[:split], nodes[split:]
        seen = tree_mask(after, before)
        for row, node in enumerate(after):
            assert [other for column, other in enumerate(nodes) if seen[row, column]] == [
                other for other in nodes if other in set(ancestors(node))
            ]


def test_sight_by_hand():
    root = Node(0, None)
    left, right = root.child(1), root.child(2)
    deep = left.child(3)
    expected = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]], dtype=bool)
    assert np.array_equal(tree_mask([root, left, right, deep]), expected)
    assert np.array_equal(tree_mask([right, deep], [root, left]), expected[2:])


def test_paths():
    text = text_of(5, 6, 7)
    tree = TokenTree.at_end(text)
    node = tree.root.child(8).child(9)
    assert (tree.root.token, node.depth, tokens_of(node.path())) == (7, 2, [7, 8, 9])
    assert path_after(text, node) == prefix_of(text, node, CPU).tolist() == [5, 6, 7, 8, 9]
    assert prefix_of(text, tree.root, CPU).tolist() == [5, 6, 7]
    assert tree.root.child(8) is node.parent


@given(trees(), st.data())
def test_what_is_left_is_what_followed(made, data):
    """All below the new root that had been drafted or read, in the old order; nothing beside it."""
    tree, nodes = made
    root = data.draw(st.sampled_from(nodes))
    below = {node for node in nodes if root in set(ancestors(node))}
    drafted = [node for node in tree.draft_tokens if node in below and node is not root]
    held = [node for node in tree.held if node in below]
    depths = {node: node.depth - root.depth for node in below}
    reaches = {node: node.path_probability / root.path_probability for node in drafted}
    is_offered = root is tree.root or root in tree.draft_tokens
    moved = tree.moved_to(root)
    assert moved.root is root
    assert (root.parent, root.depth, root.path_probability) == (None, 0, 1.0)
    assert moved.held == held
    if is_offered:
        assert moved.draft_tokens == drafted
        assert all(abs(node.path_probability - reaches[node]) < 1e-12 for node in drafted)
    assert all(node.depth == depths[node] for node in (*moved.draft_tokens, *moved.held))
