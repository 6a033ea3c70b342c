"""Exactness by enumeration: the real hierarchy, run once for every outcome of every accept and every draw.

The levels are toys with fixed random distributions; what grows trees, judges, accepts, resamples, counts and cuts is
the code under test. No sampling error: the output distribution is summed up exactly and compared to the target's.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from offload_triforce.speculation import acceptance as rules
from offload_triforce.speculation import sampling
from offload_triforce.speculation.acceptance import Drawn, Resampled
from offload_triforce.speculation.processors import Kind
from tests.speculation import toys
from tests.speculation.speculation_toys import distribution_of, walks
from tests.speculation.toys import BROUGHT, Case, Scores, real_sampler
from tests.usual import sampled


def measured(case, rule=Resampled, sampler=Scores):
    """Distribution of the output, and the expected rejections of levels 1 and 2."""
    total, rejections = {}, np.zeros(2)
    for probability, (out, stats) in walks(lambda choices: case.run(rule(sampler(), choices))):
        total[out] = total.get(out, 0.0) + probability
        counts = (stats.draft, stats.retrieval)
        rejections += [probability * (count.judged - count.accepted) for count in counts]
    return total, rejections


def error(case, rule=Resampled):
    """Largest difference of a probability, and the expected rejections."""
    (got, rejections), expected = measured(case, rule), case.expected()
    assert set(got) <= set(expected)
    return max(abs(got.get(out, 0.0) - chance) for out, chance in expected.items()), rejections


def error_with(brought, case):
    """The same with a logits processor, in float32."""
    (got, rejections), expected = measured(case, sampler=lambda: real_sampler(brought)), case.expected(brought)
    return max(abs(got.get(out, 0.0) - expected.get(out, 0.0)) for out in got | expected), rejections


DRAFTS = [("none", 0), ("onehot", 1), ("onehot", 2), ("sampled", 1), ("sampled", 2)]


@pytest.mark.parametrize(("gamma", "draft", "gamma1"), sampled([1, 2, 3], DRAFTS, share=2))
def test_chains(gamma, draft, gamma1):
    """TriForce's own shape. The text could have gone on, so no pass is cut short by the limit."""
    wrong, (level1, level2) = error(Case(draft, gamma, gamma1, tokens=3 if gamma < 3 else 2))
    assert wrong < 1e-12
    assert level2 > 0.3
    if draft != "none" and gamma > 1:  # with gamma 1, level 1 draws its only draft token itself
        assert level1 > 0.3


TREES = {
    "two children": {"gamma": 1, "nodes": 2, "topk": 2, "tokens": 2},
    "all children": {"gamma": 1, "nodes": 3, "topk": 3, "tokens": 2},
    "a branch at the root": {"gamma": 2, "nodes": 3, "topk": 2, "tokens": 2, "more": 1},
    "both children read at once": {"gamma": 2, "nodes": 4, "topk": 2, "width": 2, "tokens": 2, "more": 1},
    "with a draft": {"gamma": 2, "nodes": 3, "topk": 2, "draft": "sampled", "gamma1": 1, "more": 1},
    "with look-up": {"gamma": 3, "nodes": 4, "topk": 2, "draft": "onehot", "gamma1": 2, "more": 1},
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("style", ["full", "cut"])
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_trees(tree, style, seed):
    """Several candidates for one place, drawn without replacement; with ``cut``, levels rule out tokens of others."""
    assert error(Case(**tree, style=style, seed=seed))[0] < 1e-12


AHEAD = {
    "chain": {"gamma": 1, "spare": 1, "tokens": 3, "more": 1},
    "longer chain": {"gamma": 2, "spare": 2, "tokens": 3, "more": 0},
    "tree": {"gamma": 1, "nodes": 2, "topk": 2, "spare": 1, "tokens": 3, "more": 0},
    "with a draft": {"gamma": 2, "draft": "sampled", "gamma1": 1, "spare": 1, "tokens": 3, "more": 0},
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", AHEAD.values(), ids=AHEAD)
def test_drafting_ahead(case, seed):
    """What was drafted while a pass was under way is judged in the next one: also behind corrections."""
    assert error(Case(**case, seed=seed))[0] < 1e-12


@pytest.mark.parametrize(("cost", "seed"), sampled([0.01, 0.3], [0, 1], share=2))
def test_adaptive_length(cost, seed):
    """How far it pays to draft depends on what has been drawn, but never on what is yet to be judged."""
    case = Case(gamma=3, nodes=4, topk=2, tokens=3, more=0, adaptive=cost, seed=seed)
    assert error(case)[0] < 1e-12


@pytest.mark.parametrize("resting", [(True,), (True, False), (False, True, True)])
@pytest.mark.parametrize("draft", ["onehot", "sampled"])
def test_drafts_straight_to_the_target(draft, resting):
    """While level 1 rests, and where it begins and ends to."""
    wrong, (_, level2) = error(Case(draft, 2, 2, tokens=3, more=1, adaptive=0.3, resting=resting))
    assert wrong < 1e-12
    assert level2 > 0.3


def test_a_target_that_minds_what_was_drafted_for_it_shows(monkeypatch):
    """It takes the same token wherever anything was drafted."""
    real = Resampled.verdict

    def mutant(self, logits, place, candidates, offered, told=None):
        return 1 if offered else real(self, logits, place, candidates, offered, told)

    monkeypatch.setattr(Resampled, "verdict", mutant)
    wrong, _ = error(Case("onehot", 2, 2, tokens=3, more=1, adaptive=0.3, resting=(True,)))
    assert wrong > 1e-3


@pytest.mark.parametrize("draft", ["none", "onehot", "sampled"])
def test_up_to_the_limit(draft):
    """The limit of new tokens shortens the last passes; whole texts of up to three tokens are compared."""
    wrong, (_, level2) = error(Case(draft, 3, 1 if draft == "sampled" else 2, tokens=3, more=0, seed=1))
    assert wrong < 1e-12
    assert level2 > 0.3


BRINGING = {
    "chain": {"draft": "sampled", "gamma": 2, "gamma1": 1, "tokens": 3, "more": 1},
    "look-up": {"draft": "onehot", "gamma": 3, "gamma1": 2, "tokens": 3, "more": 1},
    "tree": {"gamma": 2, "nodes": 3, "topk": 2, "tokens": 3, "more": 0},
    "ahead": {"gamma": 2, "spare": 2, "tokens": 3, "more": 0},
    "ahead with a draft": {"gamma": 2, "draft": "sampled", "gamma1": 1, "spare": 1, "tokens": 3, "more": 0},
}


@pytest.mark.parametrize(("case", "brought"), sampled([*BRINGING], [*BROUGHT], share=2))
def test_processors_of_users(case, brought):
    """With a state that nobody can copy, with forks, and with errors off the path: as if the target were alone."""
    wrong, (_, level2) = error_with(brought, Case(**BRINGING[case]))
    assert wrong < 1e-5
    assert level2 > 0.05


# --- mistakes


@pytest.mark.parametrize("case", BRINGING.values(), ids=BRINGING)
def test_drafts_that_call_what_counts_its_calls_show(monkeypatch, case):
    """As if everything depended on ids and scores alone."""
    monkeypatch.setattr(sampling, "kind_of", lambda processor: Kind.TEXT)
    assert error_with("unknown", Case(**case))[0] > 1e-2


@pytest.mark.parametrize("case", BRINGING.values(), ids=BRINGING)
def test_forks_that_are_none_show(monkeypatch, case):
    monkeypatch.setattr(sampling, "fork_of", lambda processor: processor)
    assert error_with("forks", Case(**case))[0] > 1e-2


def test_a_target_that_goes_on_from_a_draft_s_state_shows(monkeypatch):
    """Even where the processor is asked in order: what it has seen of scores must be the target's."""
    monkeypatch.setattr(sampling, "fork_of", lambda processor: processor)
    assert error_with("forks by scores", Case(**BRINGING["chain"]))[0] > 1e-2


def wrong_accept(odds="p/q", rest="p-q", removes=True):
    """``accept_one`` as it should be, or with a mistake."""

    def mutant(p, q, tokens, choices, ratio=None):
        p = p() if callable(p) else p
        for token in tokens:
            ratio = p[token] / q[token] if odds == "p/q" else q[token] / p[token]
            if choices.accept(min(1.0, float(ratio))):
                return token
            if rest == "p-q":
                p = sampling.residual(p, q)
            q = sampling.without(q, token) if removes else q
        return choices.draw(p)

    return mutant


CHAIN = {"draft": "sampled", "gamma": 2, "gamma1": 1}
TREE = {"gamma": 1, "nodes": 2, "topk": 2}


@pytest.mark.parametrize("case", [CHAIN, TREE], ids=["chain", "tree"])
def test_the_unbroken_mutant_is_exact(monkeypatch, case):
    """The mutations below differ from the rule by nothing but their mistake."""
    monkeypatch.setattr(rules, "accept_one", wrong_accept())
    assert error(Case(**case))[0] < 1e-12


@pytest.mark.parametrize("level", ["candidates", "verdict"])
@pytest.mark.parametrize("mistake", [{"rest": "p"}, {"odds": "q/p"}], ids=["resamples from p", "accepts with q/p"])
def test_a_mistake_at_either_level_shows(monkeypatch, mistake, level):
    """At level 1 too: what counts as its own distribution must be what its tokens were really drawn from."""
    right, wrong = rules.accept_one, wrong_accept(**mistake)
    inside = []
    verdict = Resampled.verdict

    def noting(self, *args):
        inside.append(True)
        token = verdict(self, *args)
        inside.pop()
        return token

    monkeypatch.setattr(Resampled, "verdict", noting)
    monkeypatch.setattr(rules, "accept_one", lambda *a: (wrong if bool(inside) == (level == "verdict") else right)(*a))
    assert error(Case(**CHAIN))[0] > 1e-3


def test_candidates_with_replacement_show(monkeypatch):
    """The second candidate has another distribution than the first."""
    monkeypatch.setattr(rules, "accept_one", wrong_accept(removes=False))
    assert error(Case(**TREE))[0] > 1e-3


def test_reporting_the_drafts_distributions_shows(monkeypatch):
    """A token that the drafter drew and level 1 accepted has level 1's distribution, not the drafter's."""
    token = Drawn.token

    def mutant(self, rank):
        found = token(self, rank)
        if self._draft_token is not None and self._draft_token.q is not None:
            self.q = self._draft_token.q
        return found

    monkeypatch.setattr(Drawn, "token", mutant)
    assert error(Case(**CHAIN, tokens=3))[0] > 1e-3


def test_choosing_by_what_was_drawn_shows(monkeypatch):
    """Whether a candidate is offered must be decided before it is drawn, and not by what it is."""
    monkeypatch.setattr(toys, "FLAT", (tuple([0.9] * 16), tuple([0.9] + [0.0] * 15)))
    assert error(Case(**TREE))[0] < 1e-12
    monkeypatch.setattr(Drawn, "kind", lambda self, rank: 0 if rank == 0 or self.token(rank) == 1 else 15)
    assert error(Case(**TREE))[0] > 1e-4


def test_the_error_of_the_released_triforce():
    """With p = (.5, .5) and q = (.9, .1), resampling a rejected token from p itself emits (.7, .3)."""
    p, q = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([0.9, 0.1], dtype=torch.float64)

    def first_token(rule):
        return distribution_of(lambda choices: rule(p, q, [choices.draw(q)], choices))

    assert first_token(sampling.accept_one) == pytest.approx({0: 0.5, 1: 0.5}, abs=1e-7)
    assert first_token(wrong_accept(rest="p")) == pytest.approx({0: 0.7, 1: 0.3}, abs=1e-7)
