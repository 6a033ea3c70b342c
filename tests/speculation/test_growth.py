"""How a tree grows: where it is likeliest to be right, as far as it pays, within its limits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_triforce.speculation.drafting import Drafting
from offload_triforce.speculation.economy import History, Pace
from offload_triforce.speculation.growth import FIRST_STEPS, Limits, Middle
from offload_triforce.speculation.rules import Coupling
from offload_triforce.speculation.sampling import Sampler
from offload_triforce.speculation.text import TokenText
from offload_triforce.stats import DecodeStats

WORDS = 12
FLAT = ((0.7,) * 16, (0.2,) * 16, (0.05,) * 16)


class Reader:
    """A level whose logits follow from the token alone. It holds no more than ``room`` tokens."""

    def __init__(self, room, seed=0):
        self.room, self.read, self.asked = room, [], []
        self.rows = torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(seed))

    def score(self, nodes, before):
        assert list(before) == self.read
        self.read += nodes
        assert len(self.read) <= self.room
        self.asked.append(len(nodes))
        return torch.stack([self.rows[node.token] for node in nodes])

    def keep(self, kept):
        self.read = [self.read[number] for number in kept]


def grower(cost=0.01, ended=lambda token: False, prior=FLAT, pace=None, **limits):
    fixed = {"depth": 6, "nodes": 12, "branches": 3, "width": 3, "room": 60, "adaptive": True, "ahead": False}
    limits = Limits(**{**fixed, **limits})
    level, pace = Reader(limits.room), pace or Pace(cost)
    rule = Coupling(Sampler([], False, WORDS), None)
    history = History(prior)
    return Middle(level, Drafting([], 0, True), rule, limits, history, pace, ended, DecodeStats()), level


def text():
    return TokenText(torch.tensor([1, 2, 3]), 40)


@settings(deadline=None)
@given(
    st.integers(1, 8),
    st.integers(1, 30),
    st.integers(1, 4),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.003, 0.1, 0.5]),
    st.integers(0, 9),
)
def test_limits_hold(depth, more, branches, width, adaptive, ahead, cost, limit):
    nodes = depth + more
    room = 2 * nodes + 1 + width
    middle, level = grower(
        cost, depth=depth, nodes=nodes, branches=branches, width=width, room=room, adaptive=adaptive, ahead=ahead
    )
    for _ in range(3):
        block = middle.propose(text(), limit)
        root, guesses = block[0], block[1:]
        assert root.depth == 0
        assert len(guesses) <= nodes
        assert all(node.depth <= min(depth, limit) for node in guesses)
        assert all(node.parent in block[:number] for number, node in enumerate(block) if number), "parents come first"
        assert all(len(node.children) <= branches for node in block)
        assert all(count <= width for count in level.asked)
        taken = int(level.rows[root.token].argmax())
        middle.learn(root, taken)
        middle.move_to(root, taken)
        middle.passed(len(block), 1.0, 1, 0.5)


def test_the_likeliest_are_picked():
    """No guess that was left out is likelier than one that the target reads."""
    middle, _ = grower(nodes=7, adaptive=False, width=4)
    block = middle.propose(text(), 20)
    left = [node for node in middle._tree.guesses if node not in block]
    assert len(block) == 8
    assert left
    assert max(node.reach for node in left) <= min(node.reach for node in block)


def test_a_dear_step_is_not_made():
    """After a round of known cost, cheap steps grow a larger tree than dear ones, and hopeless guesses none."""
    sizes = {}
    for cost in (0.001, 0.1, 0.6):
        middle, level = grower(cost, nodes=40, depth=20)
        block = middle.propose(text(), 30)
        assert len(level.asked) <= FIRST_STEPS
        middle.passed(len(block), 1.0, 3, 0.0)
        middle.move_to(block[0], WORDS - 1)
        level.asked.clear()
        middle.propose(text(), 30)
        sizes[cost] = len(level.asked)
    assert sizes[0.001] > sizes[0.1] > sizes[0.6]


def test_nothing_follows_an_end():
    best = {}
    middle, _ = grower(adaptive=False, branches=1, width=1)
    for node in middle.propose(text(), 6):
        best[node.depth] = node.token
    end = best[2]
    middle, _ = grower(adaptive=False, branches=1, width=1, ended=lambda token: token == end)
    assert [node.token for node in middle.propose(text(), 6)] == [best[0], best[1], end]


def test_what_follows_the_verdict_is_kept():
    """Ahead of the verdict more is guessed; what lies behind the token that came is there for the next pass."""
    middle, level = grower(ahead=True, nodes=6, width=2)
    middle.propose(text(), 20)
    middle.passed(7, 1.0, 3, 0.0)
    block = middle.propose(text(), 20)
    steps = len(level.asked)
    child = block[0].children[0]
    behind = [node for node in middle._tree.guesses if child in node.line() and node is not child]
    assert behind
    middle.move_to(block[0], child.token)
    assert middle._tree.root is child
    assert middle._tree.guesses == behind
    assert level.read == middle._tree.held
    assert len(level.asked) == steps


@pytest.mark.parametrize("token", [WORDS - 1])
def test_after_a_surprise_it_begins_anew(token):
    middle, level = grower()
    block = middle.propose(text(), 5)
    assert token not in block[0].known
    middle.move_to(block[0], token)
    assert middle._tree is None
    assert level.read == []


def test_history_steers_the_branches():
    """Where second candidates never come, none is guessed."""
    middle, _ = grower(prior=((0.9,) * 16, (0.0,) * 16, (0.0,) * 16), adaptive=False, nodes=6)
    assert all(len(node.children) <= 1 for node in middle.propose(text(), 6))
