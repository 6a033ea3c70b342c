"""Exactness by enumeration where the text leaves a state: real levels and caches of a tiny hybrid, every outcome once.

Beside the caches of the target's keys and values stand the states of its recurrent layers, the nodes that wait for a
verdict, and those of level 1 that stay behind a commit. Transformers' own model says what each text's logits are.
"""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch

from offload_triforce.cache.recurrent import PendingNodes, RecurrentCache
from offload_triforce.speculation.acceptance import Coupled, Resampled
from offload_triforce.speculation.sampling import RandomChoices
from tests.runtime.hybrid_case import CoarseScores, FewNoises, HybridCase, coarse
from tests.speculation.speculation_toys import walks
from tests.usual import sampled

CHAIN = {"tokens": 3, "gamma": 2, "topk": 1, "width": 1, "overlap": False}
TREE = {"tokens": 3, "gamma": 2, "draft_tokens": 4, "topk": 2, "width": 2, "overlap": False}
AHEAD = {"tokens": 3, "gamma": 1, "draft_tokens": 2, "topk": 2, "width": 1, "overlap": True}
CASES = {
    "chain": {**CHAIN, "more": 1},
    "tree": TREE,
    "ahead": AHEAD,
    "a hybrid as level 0": {**CHAIN, "draft": "self", "gamma1": 1, "draft_cache": 10},
}
# Level 1 holds the whole text here: it says what the target says, as long as its states are right.
ALL_SEEING = {**TREE, "tokens": 8, "more": 3, "overlap": True, "budget": 40, "rows": False, "seed": 3}


def measured(case, rule):
    """Distribution of the answers; and, all expected: rejections of levels 1 and 2, and steps ahead."""
    total, counts = {}, torch.zeros(3, dtype=torch.float64)

    def make_rule(choices):
        if rule == "coupled":
            return Coupled(CoarseScores(), FewNoises(choices))
        return Resampled(CoarseScores(), choices)

    for probability, (out, stats) in walks(lambda choices: case.run(make_rule(choices))):
        total[out] = total.get(out, 0.0) + probability
        rejected = [level.judged - level.accepted for level in (stats.draft, stats.retrieval)]
        counts += probability * torch.tensor([*rejected, stats.steps_ahead], dtype=torch.float64)
    return total, *counts.tolist()


def error(case, rule):
    """Largest difference of a probability, and those counts."""
    (got, *counts), expected = measured(case, rule), case.expected(drawn=rule == "resampled")
    return max(abs(got.get(out, 0.0) - expected.get(out, 0.0)) for out in got | expected), *counts


@pytest.fixture
def case(request):
    """``request.param``: a name of ``CASES``, or settings."""
    settings = CASES[request.param] if isinstance(request.param, str) else request.param
    made = HybridCase(**{"seed": 2, **settings})
    yield made
    made.close()


@pytest.mark.parametrize(("case", "rule"), sampled([*CASES], ["coupled", "resampled"], share=2), indirect=["case"])
def test_the_targets_own_distribution_comes_out(case, rule):
    wrong, level1, level2, ahead = error(case, rule)
    assert wrong < 1e-9
    assert case.margin > 5e-5, "float32's rounding is far from the steps that samplers read in"
    assert level2 > 0.01 or case.settings.topk > 1
    assert bool(level1) == (case.settings.gamma1 > 0)
    assert bool(ahead) == case.settings.overlap


class Comparing(Resampled):
    """Counts the nodes at which level 1 has not said what the target says, and those at which both have spoken."""

    differ = compared = 0

    def survey(self, logits, nodes, text):
        for row, node in zip(coarse(logits).softmax(1), nodes, strict=True):
            if node.candidates is not None:
                self.compared += 1
                self.differ += not torch.equal(row, node.candidates.q)
        return super().survey(logits, nodes, text)


def differing(case):
    """Of some answers."""
    rules = [Comparing(CoarseScores(), RandomChoices(seed, torch.device("cpu"))) for seed in range(10)]
    ahead = sum(case.run(rule)[1].steps_ahead for rule in rules)
    assert sum(rule.compared for rule in rules) > 100
    assert ahead > 20
    return sum(rule.differ for rule in rules)


@pytest.mark.parametrize("case", [ALL_SEEING], indirect=True, ids=["all"])
def test_level_1_says_what_the_target_says_where_it_sees_everything(case):
    """In trees, in several steps, behind commits, and where it was ahead of them."""
    assert differing(case) == 0


# --- mistakes: the target's change what comes out; those of level 1, how often it is right.


def _drafts_in_the_state(monkeypatch):
    """What the target has read goes into the state before the verdict."""

    def end_step(self, tokens):
        self.nodes.end_step(tokens)
        first = self.nodes.decays[:, :, :tokens]
        parts = (self.nodes.keys[:, :, :tokens], self.nodes.updates[:, :, :tokens], first)
        self.state += parts[0].repeat_interleave(2, 1).mT @ parts[1]

    monkeypatch.setattr(RecurrentCache, "end_step", end_step)


def _committed_too_early(monkeypatch):
    """The root goes into the state as the pass ends, and once more with its path."""
    end_step, settle = RecurrentCache.end_step, RecurrentCache.settle

    def early(self, tokens):
        end_step(self, tokens)
        held = {name: part.clone() for name, part in vars(self.nodes).items() if torch.is_tensor(part)}
        length, state = self.nodes.length, self.state
        settle(self, 1)
        for name, part in held.items():
            if name != "state":
                getattr(self.nodes, name).copy_(part)
        self.nodes.length = length
        assert self.state is state

    monkeypatch.setattr(RecurrentCache, "end_step", early)


def _stale_tail(monkeypatch):
    """The convolution goes on from where the prompt ended."""
    settle = RecurrentCache.settle

    def stale(self, tokens):
        before = self.nodes.tail.clone()
        settle(self, tokens)
        self.nodes.tail.copy_(before)

    monkeypatch.setattr(RecurrentCache, "settle", stale)


def _causal(monkeypatch, room=None):
    """Every node takes all that were read before it for its ancestors. ``room``: only where so many can be held."""
    step = PendingNodes.step

    def causal(self, mask):
        if room in (None, self.capacity):
            mask = torch.ones_like(mask).tril(mask.shape[1] - mask.shape[0])
        return step(self, mask)

    monkeypatch.setattr(PendingNodes, "step", causal)


def _nothing_committed(monkeypatch):
    """A path is accepted and forgotten."""
    monkeypatch.setattr(RecurrentCache, "settle", lambda self, tokens: None)


TARGETS = [_drafts_in_the_state, _committed_too_early, _stale_tail, _nothing_committed]
PASSES = {
    **TREE,
    "tokens": 4,
    "gamma": 1,
    "draft_tokens": 2,
    "seed": 4,
}  # each from the states that the one before has left


def says_otherwise(case, choices):
    """Whether the answer to some noise is another than the target's alone."""
    noise = FewNoises(choices)
    return case.run(Coupled(CoarseScores(), noise))[0] != case.plain(noise)


@pytest.mark.parametrize("case", [PASSES], indirect=True, ids=["passes"])
def test_so_it_is_for_each_noise(case):
    assert not any(wrong for _, wrong in itertools.islice(walks(partial(says_otherwise, case)), 60))


@pytest.mark.parametrize("case", [PASSES], indirect=True, ids=["passes"])
@pytest.mark.parametrize("mutation", TARGETS, ids=lambda mutation: mutation.__name__.strip("_"))
def test_a_mistake_with_the_targets_states_shows(mutation, case, monkeypatch):
    """For some of the noises that there are, drawn at random: a walk begins with those that begin alike."""
    mutation(monkeypatch)
    assert any(says_otherwise(case, RandomChoices(seed, torch.device("cpu"))) for seed in range(400))


SMALLEST = {**CHAIN, "gamma": 1}


@pytest.mark.parametrize(
    ("mutation", "case"),
    [(_stale_tail, SMALLEST), (_nothing_committed, SMALLEST), (_causal, TREE)],
    indirect=["case"],
    ids=["stale tail", "nothing committed", "causal"],
)
def test_it_shows_with_resampling_too(mutation, case, monkeypatch):
    mutation(monkeypatch)
    assert error(case, "resampled")[0] > 1e-3


def _not_rebased(monkeypatch):
    """What level 1 has read further still counts from where the text was."""
    select = PendingNodes.select

    def kept_as_it_was(self, kept):
        before, first = self.decays.clone(), kept[0] if len(kept) else 0
        select(self, kept)
        if first:
            self.decays[:, :, : len(kept)] = before[:, :, list(kept)]

    monkeypatch.setattr(PendingNodes, "select", kept_as_it_was)


def _stale_tail_of_level_1(monkeypatch):
    settle = RecurrentCache.settle

    def stale(self, tokens):
        before = self.drafts.tail.clone()
        settle(self, tokens)
        self.drafts.tail.copy_(before)

    monkeypatch.setattr(RecurrentCache, "settle", stale)


def _drafts_left_behind(monkeypatch):
    """What the verdict has ruled out still is an ancestor's row: nothing is moved together."""

    def unmoved(self, kept):
        self.length = len(kept)

    select = PendingNodes.select
    monkeypatch.setattr(
        PendingNodes, "select", lambda self, kept: (unmoved if self.capacity == ROOM else select)(self, kept)
    )


def _causal_at_level_1(monkeypatch):
    _causal(monkeypatch, room=ROOM)


ROOM = 11  # that level 1 has in ALL_SEEING: nothing else holds as many
LEVEL_1 = [_not_rebased, _stale_tail_of_level_1, _drafts_left_behind, _causal_at_level_1]


@pytest.mark.parametrize("case", [ALL_SEEING], indirect=True, ids=["all"])
@pytest.mark.parametrize("mutation", LEVEL_1, ids=lambda mutation: mutation.__name__.strip("_"))
def test_a_mistake_with_level_1s_states_shows(mutation, case, monkeypatch):
    """It costs tokens, and changes none: that is for the test above to see."""
    assert case.runtime.caches.recurrent.drafts.capacity == ROOM
    mutation(monkeypatch)
    assert differing(case) > 20
