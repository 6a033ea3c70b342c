"""The planner's rounds against the real tree drafter, over levels that do nothing but take their time."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from offload_triforce.config import Settings
from offload_triforce.planner import rounds as walked
from offload_triforce.planner.acceptance_length import of_coupled
from offload_triforce.planner.rounds import Costs, Level0, PassCurve, pass_curve, walk_rounds
from offload_triforce.runtime.runtime import limits_of
from offload_triforce.scheduler.pipeline import Slack
from offload_triforce.scheduler.simulate import PassTime, chain, rounds
from offload_triforce.speculation import adaptive, hierarchy, tree_drafter
from offload_triforce.speculation.acceptance import DraftToken
from offload_triforce.speculation.adaptive import AcceptanceModel, DraftController, MeasuredCosts
from offload_triforce.speculation.draft_selector import DraftSelector
from offload_triforce.speculation.sampling import Survey
from offload_triforce.speculation.stats import DecodeStats
from offload_triforce.speculation.text import TokenText
from offload_triforce.speculation.tree_drafter import TreeDrafter

NOBODY, WRONG = 9, 8  # a token that is no candidate, and one that a drafter is wrong by


def costs(passing=2.0, waited=1.5, covered=1.0, step_1=0.02, step_token=0.0, pass_token=0.0):
    """A pass of one token takes ``passing``, and each further one ``pass_token``."""
    last = PassTime(passing + 192 * pass_token, passing, waited)
    return Costs(PassCurve((1, 193), (PassTime(passing, passing, waited), last)), covered, step_1, step_token)


class Toy:
    """Levels, drafter, rule and clock in one: candidates of a place are the tokens 0, 1, ..., its class is drawn."""

    def __init__(self, table, drafted, given, seed):
        self.table, self.rate, self.given = table, drafted, given
        self.chance, self.now, self.began = random.Random(seed), 0.0, 0.0

    def mark(self):
        toy, at = self, self.now

        class Mark:
            def since(self, earlier):
                return at - earlier.at

        mark = Mark()
        mark.at, mark.toy = at, toy
        return mark

    # A level, and the target.
    def score(self, nodes, other):
        if other is None or callable(other):
            while other is not None and other():
                pass
            self.now = self.began + self.given.passes.at(len(nodes)).seconds
        else:
            self.now += self.given.step(len(nodes))
        return torch.zeros(len(nodes), 1)

    def keep(self, kept):
        pass

    def commit(self, kept):
        pass

    def slack(self):
        return Slack(self.given.passes.passes[0].waited, self.given.covered)

    # A drafter.
    def offer(self, text):
        return "model" if self.rate else None

    def draft(self, text, count, before=None):
        return [DraftToken(0 if self.chance.random() < self.rate else WRONG, None) for _ in range(count)]

    # A rule.
    def candidates(self, logits, places, drafted):
        return [Candidates(self.chance.choices(range(len(self.table.weights)), self.table.weights)[0]) for _ in places]

    def survey(self, logits, nodes, text):
        return Survey(True, [None] * len(nodes))

    def verdict(self, logits, place, candidates, offered, told):
        if candidates is None:
            return NOBODY
        shares = self.table.shares[candidates.group]
        return self.chance.choices([*range(len(shares)), NOBODY], [*shares, max(0.0, 1 - sum(shares))])[0]


class Candidates:
    """Of a place of that class."""

    tokens = (0, 1, 2, 3)

    def __init__(self, group):
        self.group = group

    def token(self, rank):
        return rank

    def kind(self, rank):
        return self.group


def run(table, drafted, settings, given, tokens, monkeypatch):
    """The real ``decode`` with the real tree drafter and its controller, of that many tokens."""
    toy, stats = Toy(table, drafted, given, seed=1), DecodeStats()
    controller, selector = DraftController(MeasuredCosts()), DraftSelector([toy], settings.gamma1, settings.adaptive)
    acceptance = AcceptanceModel(tuple(zip(*table.shares, strict=True)))
    drafter = TreeDrafter(
        toy, selector, toy, limits_of(settings), acceptance, controller, lambda token: False, stats, toy
    )

    def clock():
        toy.began = toy.now  # what ``decode`` asks before a pass, and again behind it
        return toy.now

    monkeypatch.setattr(hierarchy.time, "perf_counter", clock)
    text = TokenText(torch.tensor([1, 2, 3]), tokens + 10)
    for _ in hierarchy.decode(toy, drafter, toy, text, tokens, stats, lambda text: False):
        pass
    return stats, toy.now


@pytest.mark.parametrize(
    ("first", "drafted", "given", "chosen", "tokens"),
    [
        (0.93, 0.15, costs(), Settings(gamma=16), 4000),
        (0.93, 0.6, costs(), Settings(gamma=16, overlap=False), 3500),
        (0.85, 0.3, costs(1.0, 0.7, 1.0, 0.1, 0.01), Settings(), 3000),
        (0.9, 0.25, costs(), Settings.triforce(), 3000),
        (0.9, 0.0, costs(1.0, 0.0, 0.0, 0.2, 0.005, 0.003), Settings(), 3000),
    ],
    ids=["overlapped", "not overlapped", "dear steps", "the paper's", "dear passes"],
)
def test_rounds_are_those_of_the_real_tree_drafter(first, drafted, given, chosen, tokens, monkeypatch):
    """Both draw by chance, for some hundred rounds."""
    table = of_coupled().scaled(first)
    stats, took = run(table, drafted, chosen, given, tokens, monkeypatch)
    told = walk_rounds(table, Level0(drafted), chosen, given, rounds=800)
    assert told.tokens == pytest.approx(stats.tokens_per_pass, rel=0.1)
    assert told.steps == pytest.approx((stats.steps - stats.steps_ahead) / stats.passes, rel=0.15)
    assert told.hidden == pytest.approx(stats.steps_ahead / stats.passes, rel=0.2)
    assert told.picked == pytest.approx(stats.draft_tokens / stats.passes, rel=0.25)  # the last of them bring little
    assert told.ms_per_token == pytest.approx(1e3 * took / stats.new_tokens, rel=0.1)


def test_what_is_known_of_the_controller_is_so():
    assert (walked.ROUNDS, walked.LATE) == (adaptive.ROUNDS, adaptive.LATE)
    assert walked.step_size is tree_drafter.step_size


@pytest.mark.parametrize(("rate", "drafted"), [(0.8, 0.35), (0.93, 0.0), (0.7, 0.8)])
def test_chains_are_as_the_formulas_have_them(rate, drafted):
    told = walk_rounds(of_coupled().scaled(rate), Level0(drafted), Settings.triforce(), costs())
    assert told.tokens == pytest.approx(chain(rate, 12), rel=0.04)
    assert told.steps == pytest.approx(rounds(12, 2, drafted), rel=0.03)
    assert (told.hidden, told.pass_s) == (0, 2.0)


def test_a_pass_hides_what_it_waits_for_and_the_ring_covers():
    table, level0 = of_coupled(), Level0(0.15)
    free = walk_rounds(table, level0, Settings(), costs(), rounds=30)
    assert free.hidden > 10
    for given, chosen in (
        (costs(waited=0.0), Settings()),
        (costs(covered=0.0159), Settings()),  # a step may take a quarter longer than the ring covers
        (costs(), Settings(overlap=False)),
    ):
        assert walk_rounds(table, level0, chosen, given, rounds=30).hidden == 0
    some = walk_rounds(table, level0, Settings(), costs(waited=0.105), rounds=30)
    assert 4 < some.hidden <= 5


def test_what_is_drafted_ahead_spares_steps_before_the_next_pass():
    table, given = of_coupled().scaled(0.95), costs(step_1=0.1)
    ahead = walk_rounds(table, Level0(0.15), Settings(), given)
    alone = walk_rounds(table, Level0(0.15), Settings(overlap=False), given)
    assert ahead.ms_per_token < 0.97 * alone.ms_per_token


def test_what_is_drafted_ahead_gets_the_branches_of_a_tree_from_the_root():
    """A link as slow as a card's, and the longest trees: what was unlikely seen from the old root has become likely."""
    table, chosen = of_coupled().scaled(0.933), Settings(draft_tokens=768, width=32)
    given = costs(1.7, 1.6, 0.03, 0.018, 0.0)
    both = (chosen, replace(chosen, overlap=False))
    ahead, alone = (walk_rounds(table, Level0(0.15), settings, given).tokens for settings in both)
    assert ahead > 0.97 * alone


def test_a_short_answer_begins_and_ends():
    """A single token needs no draft token; an answer as long as a path of them gets fewer tokens per pass."""
    table, level0 = of_coupled(), Level0(0.15)
    one = walk_rounds(table, level0, Settings(), costs(), answer=1, rounds=10)
    assert (one.tokens, one.picked, one.steps) == (1, 0, 0)
    long = walk_rounds(table, level0, Settings(), costs())
    assert walk_rounds(table, level0, Settings(), costs(), answer=24, rounds=100).tokens < 0.9 * long.tokens


def test_drafters_that_offer_seldom_help_seldom():
    table, given = of_coupled(), costs()
    steps = [
        walk_rounds(table, Level0(0.9, offers), Settings.triforce(), given, rounds=60).steps
        for offers in (1.0, 0.5, 0.0)
    ]
    assert steps[0] < 0.75 * steps[1] < 0.75 * steps[2] == 0.75 * 12


def test_curves_go_straight_between_what_is_known():
    curve = pass_curve(41, lambda tokens: PassTime(1 + tokens, 0.5, 2 * tokens))
    assert curve.tokens == (1, 11, 41)
    assert curve.at(6) == PassTime(7.0, 0.5, 12.0)
    assert curve.per_token == 1.0
    assert pass_curve(1, lambda tokens: PassTime(3.0, 1.0, 1.0)).at(1).seconds == 3.0
