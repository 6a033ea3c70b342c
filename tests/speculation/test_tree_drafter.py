"""How a tree grows: where it is likeliest to be right, as far as it pays, within its limits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_triforce.scheduler.clock import HostClock
from offload_triforce.scheduler.pipeline import Slack
from offload_triforce.speculation.acceptance import Coupled
from offload_triforce.speculation.adaptive import (
    AcceptanceModel,
    DraftController,
    GivenCosts,
    MeasuredCosts,
    make_costs,
)
from offload_triforce.speculation.draft_selector import DraftSelector
from offload_triforce.speculation.sampling import Sampler
from offload_triforce.speculation.stats import DecodeStats
from offload_triforce.speculation.text import TokenText
from offload_triforce.speculation.tree_drafter import LEAST_PROBABILITY, Limits, TreeDrafter, step_size

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


def grower(cost=0.01, ended=lambda token: False, prior=FLAT, controller=None, clock=None, **limits):
    fixed = {"depth": 6, "nodes": 12, "topk": 3, "width": 3, "room": 60, "adaptive": True, "overlap": False}
    limits = Limits(**{**fixed, **limits})
    level, controller = Reader(limits.room), controller or DraftController(make_costs(cost))
    rule = Coupled(Sampler([], False, WORDS), None)
    acceptance, clock = AcceptanceModel(prior), clock or HostClock()
    return TreeDrafter(
        level,
        DraftSelector([], 0, True),
        rule,
        limits,
        acceptance,
        controller,
        ended,
        DecodeStats(),
        clock or HostClock(),
    ), level


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
def test_limits_hold(depth, more, topk, width, adaptive, ahead, cost, limit):
    nodes = depth + more
    room = 2 * nodes + 1 + width
    tree_drafter, level = grower(
        cost, depth=depth, nodes=nodes, topk=topk, width=width, room=room, adaptive=adaptive, overlap=ahead
    )
    for _ in range(3):
        block = tree_drafter.propose(text(), limit)
        root, drafted = block[0], block[1:]
        assert root.depth == 0
        assert len(drafted) <= nodes
        assert all(node.depth <= min(depth, limit) for node in drafted)
        assert all(node.parent in block[:number] for number, node in enumerate(block) if number), "parents come first"
        assert all(len(node.children) <= topk for node in block)
        assert all(count <= width for count in level.asked)
        taken = int(level.rows[root.token].argmax())
        tree_drafter.learn(root, taken)
        tree_drafter.move_to(root, taken)
        tree_drafter.passed(len(block), 1.0, 1, 0.5)


def test_the_likeliest_are_picked():
    """No draft token that was left out is likelier than one that the target reads."""
    tree_drafter, _ = grower(nodes=7, adaptive=False, width=4)
    block = tree_drafter.propose(text(), 20)
    left = [node for node in tree_drafter._tree.draft_tokens if node not in block]
    assert len(block) == 8
    assert left
    assert max(node.path_probability for node in left) <= min(node.path_probability for node in block)


def test_wide_steps_have_few_sizes():
    """Each size is captured as a graph of its own. Nothing is lost: the likeliest are read, the others stay leaves."""
    sizes = set()
    for nodes in range(20, 60, 3):
        tree_drafter, level = grower(nodes=nodes, adaptive=False, width=nodes // 2, depth=9, room=400)
        tree_drafter.propose(text(), 20)
        sizes |= set(level.asked)
        read = [node.path_probability for node in tree_drafter._tree.draft_tokens if node.candidates is not None]
        assert len(read) + 1 == len(level.read)
    assert max(sizes) > 8
    assert all(step_size(size) == size for size in sizes)


def test_a_dear_step_is_not_made():
    """After a round of known cost, cheap steps grow a larger tree than dear ones, and hopeless drafts none."""
    sizes = {}
    for cost in (0.001, 0.1, 0.6):
        tree_drafter, level = grower(cost, nodes=40, depth=20)
        block = tree_drafter.propose(text(), 30)
        assert len(level.asked) <= GivenCosts.first_steps
        tree_drafter.passed(len(block), 1.0, 3, 0.0)
        tree_drafter.move_to(block[0], WORDS - 1)
        level.asked.clear()
        tree_drafter.propose(text(), 30)
        sizes[cost] = len(level.asked)
    assert sizes[0.001] > sizes[0.1] > sizes[0.6]


def test_nothing_follows_an_end():
    best = {}
    tree_drafter, _ = grower(adaptive=False, topk=1, width=1)
    for node in tree_drafter.propose(text(), 6):
        best[node.depth] = node.token
    end = best[2]
    tree_drafter, _ = grower(adaptive=False, topk=1, width=1, ended=lambda token: token == end)
    assert [node.token for node in tree_drafter.propose(text(), 6)] == [best[0], best[1], end]


def test_what_follows_the_verdict_is_kept():
    """Ahead of the verdict more is drafted; what lies behind the token that came is there for the next pass."""
    tree_drafter, level = grower(overlap=True, nodes=6, width=2)
    tree_drafter.propose(text(), 20)
    tree_drafter.passed(7, 1.0, 3, 0.0)
    block = tree_drafter.propose(text(), 20)
    steps = len(level.asked)
    child = block[0].children[0]
    behind = [node for node in tree_drafter._tree.draft_tokens if child in node.path() and node is not child]
    assert behind
    tree_drafter.move_to(block[0], child.token)
    assert tree_drafter._tree.root is child
    assert tree_drafter._tree.draft_tokens[: len(behind)] == behind
    assert level.read == tree_drafter._tree.held
    assert len(level.asked) == steps


def offered(node, prior, topk):
    """As many candidates as are likely enough where the node is."""
    likely = [rank for rank in range(topk) if not rank or node.path_probability * prior[rank][0] >= LEAST_PROBABILITY]
    return len(likely)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_what_was_too_unlikely_to_be_drafted_is_when_its_place_has_become_likely(rank):
    """It was drafted ahead far from the old root, with fewer candidates per place than it gets from the new one."""
    tree_drafter, _ = grower(overlap=True, nodes=40, depth=12, width=4, room=400)
    for _ in range(3):
        tree_drafter.propose(text(), 30)
        tree_drafter.passed(7, 1.0, 3, 0.0)
    tree, child = tree_drafter._tree, tree_drafter._tree.root.children[rank]

    def read():
        return [node for node in (child, *tree.draft_tokens) if node.candidates is not None and child in node.path()]

    few = [len(node.children) for node in read()]
    tree_drafter.move_to(tree.root, child.token)
    tree = tree_drafter._tree
    kept = [node for node in (tree.root, *tree.draft_tokens) if node.candidates is not None]
    assert kept
    assert [len(node.children) for node in kept] == [offered(node, FLAT, 3) for node in kept]
    assert sum(len(node.children) for node in kept) > sum(few) or rank == 2
    for node in kept:
        tokens = [node.candidates.token(number) for number in range(len(node.children))]
        assert [below.token for below in node.children] == tokens
    assert all(node in tree.draft_tokens for above in kept for node in above.children)
    assert len(set(tree.draft_tokens)) == len(tree.draft_tokens)


@pytest.mark.parametrize("token", [WORDS - 1])
def test_after_a_surprise_it_begins_anew(token):
    tree_drafter, level = grower()
    block = tree_drafter.propose(text(), 5)
    assert token not in block[0].known
    tree_drafter.move_to(block[0], token)
    assert tree_drafter._tree is None
    assert level.read == []


def test_the_acceptance_model_steers_the_branches():
    """Where second candidates never come, none is drafted."""
    tree_drafter, _ = grower(prior=((0.9,) * 16, (0.0,) * 16, (0.0,) * 16), adaptive=False, nodes=6)
    assert all(len(node.children) <= 1 for node in tree_drafter.propose(text(), 6))


def test_leaves_are_looked_for_once_a_step(monkeypatch):
    """And once more to find that no step pays."""
    asked = []
    leaves = TreeDrafter._leaves
    monkeypatch.setattr(TreeDrafter, "_leaves", lambda self: asked.append(1) or leaves(self))
    tree_drafter, level = grower(overlap=True, nodes=12, width=2)
    for _ in range(3):
        root = tree_drafter.propose(text(), 20)[0]
        tree_drafter.passed(7, 1.0, 3, Slack())
        tree_drafter.move_to(root, next(token for token in range(WORDS) if token not in root.known))
        assert len(level.asked) > 3
        assert len(asked) <= len(level.asked) + 2
        asked.clear()
        level.asked.clear()


class Queue:
    """A device that is given work ahead of time: a mark lies where it will be through with all of it."""

    def __init__(self):
        self.end = 0.0

    def mark(self):
        return Point(self.end)


class Point(float):
    def since(self, earlier):
        return self - earlier


def test_work_that_was_queued_before_a_step_is_none_of_its_time(monkeypatch):
    """Tiles for 5 s are on their way through the device whenever a step of 2 s is made."""
    queue = Queue()
    tree_drafter, level = grower(controller=DraftController(MeasuredCosts()), clock=queue, overlap=True)
    score = level.score

    def reading(nodes, before):
        queue.end += 2.0
        return score(nodes, before)

    monkeypatch.setattr(level, "score", reading)
    tree_drafter.propose(text(), 20)
    tree_drafter.passed(7, 30.0, 3, Slack(4.0, 3.0))
    tree_drafter.propose(text(), 20)
    hidden = 0
    while queue_tiles(queue) and tree_drafter.go_on():
        hidden += 1
    assert tree_drafter.controller.step_cost(3) == pytest.approx(2.0)
    assert hidden == 2, "that is what a pass leaves time for, by the time that steps take"
    tree_drafter.passed(7, 30.0, 3, Slack(4.0, 3.0))
    assert tree_drafter.stats.draft_s == pytest.approx(2.0 * tree_drafter.stats.steps)
    assert tree_drafter.stats.ahead_s == pytest.approx(2.0 * hidden)


def queue_tiles(queue):
    queue.end += 5.0
    return True
