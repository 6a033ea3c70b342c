"""The planner's rounds against the real tree drafter, over levels that do nothing but take their time."""

from __future__ import annotations

import random
import statistics

import pytest
import torch

from offload_triforce.config import Settings
from offload_triforce.planner.acceptance_length import AcceptanceByRank, of_coupled
from offload_triforce.planner.drafting import Costs, PassCurve, walk_rounds
from offload_triforce.scheduler.pipeline import Slack
from offload_triforce.scheduler.simulate import PassTime, chain, rounds
from offload_triforce.speculation import hierarchy
from offload_triforce.speculation.acceptance import DraftToken
from offload_triforce.speculation.adaptive import AcceptanceModel, DraftController, MeasuredCosts
from offload_triforce.speculation.draft_selector import DraftSelector
from offload_triforce.speculation.sampling import Survey
from offload_triforce.speculation.stats import DecodeStats
from offload_triforce.speculation.text import TokenText
from offload_triforce.speculation.tree_drafter import Limits, TreeDrafter

NOBODY, WRONG = 9, 8  # a token that is no candidate, and one that a drafter is wrong by


def costs(passing=2.0, waited=1.5, covered=1.0, step_1=0.02, step_token=0.0, pass_token=0.0):
    """A pass of one token takes ``passing``, and each further one ``pass_token``."""
    last = PassTime(passing + 192 * pass_token, passing, waited)
    return Costs(PassCurve((1, 193), (PassTime(passing, passing, waited), last)), covered, step_1, step_token)


class Toy:
    """Levels, drafter, rule and clock in one: candidates of a place are the tokens 0, 1, ..., its class is drawn."""

    def __init__(self, table, drafted, given, seed):
        self.table, self.rate, self.given, self.chance, self.now = table, drafted, given, random.Random(seed), 0.0

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
        return "model"

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
    limits = Limits(
        settings.gamma,
        settings.most_draft_tokens,
        settings.topk,
        settings.width,
        settings.room,
        settings.adaptive,
        settings.overlap,
    )
    controller, selector = DraftController(MeasuredCosts()), DraftSelector([toy], settings.gamma1, settings.adaptive)
    acceptance = AcceptanceModel(tuple(zip(*table.shares, strict=True)))
    drafter = TreeDrafter(toy, selector, toy, limits, acceptance, controller, lambda token: False, stats, toy)

    def clock():
        toy.began = toy.now  # what ``decode`` asks before a pass, and again behind it
        return toy.now

    monkeypatch.setattr(hierarchy.time, "perf_counter", clock)
    text = TokenText(torch.tensor([1, 2, 3]), tokens + 10)
    for _ in hierarchy.decode(toy, drafter, toy, text, tokens, stats, lambda text: False):
        pass
    return stats, toy.now
