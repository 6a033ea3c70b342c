"""Level 1 rests where it does not pay: what that costs, by the count, and what is drafted meanwhile."""

from __future__ import annotations

import pytest
import torch

from offload_triforce.scheduler.pipeline import Slack
from offload_triforce.speculation.adaptive import DraftController, MeasuredCosts
from offload_triforce.speculation.direct import MOST, DirectDrafter
from offload_triforce.speculation.draft_selector import DraftSelector
from offload_triforce.speculation.ngram import NgramDrafter
from offload_triforce.speculation.stats import DecodeStats
from offload_triforce.speculation.text import TokenText
from offload_triforce.speculation.tree import TokenTree

NOTHING = Slack()


def decode(controller, tokens, step, bare, tree_pass, per_round):
    """So many tokens by a clock of its own: seconds, and rounds with steps. A tree takes three steps a round."""
    seconds = made = drafted = 0
    while made < tokens:
        controller.begin()
        spent, new, took = 0.0, 1, bare
        if not controller.lean:
            drafted += 1
            for number in range(3):
                controller.step(1, step, 0.0, hidden=False)
                spent += step
                if number == 0 and controller.too_dear():
                    break
            else:
                new, took = per_round, tree_pass
        controller.round(new, took, new, NOTHING)
        seconds += spent + took
        made += new
    return seconds, drafted


@pytest.mark.parametrize("tokens", [48, 128, 512])
@pytest.mark.parametrize("step", [0.8, 1.0, 1.5])
def test_where_a_step_costs_what_a_pass_does_drafting_costs_next_to_nothing(step, tokens):
    controller = DraftController(MeasuredCosts(), lean=True)
    seconds, drafted = decode(controller, tokens, step, 1.0, 1.3, per_round=3)
    assert seconds <= 1.05 * tokens
    assert (drafted > 0) == (tokens > 32), "it is tried, though"


def test_it_is_tried_less_and_less_often():
    controller = DraftController(MeasuredCosts(), lean=True)
    tries = [decode(controller, 512, 1.0, 1.0, 1.3, 3)[1] for _ in range(4)]
    assert tries[0] >= 2
    assert sum(tries[1:]) <= 2


@pytest.mark.parametrize("lean", [True, False])
def test_where_it_pays_level_1_drafts(lean):
    controller = DraftController(MeasuredCosts(), lean=lean)
    seconds, drafted = decode(controller, 400, 0.05, 1.0, 1.1, per_round=4)
    assert not controller.lean
    assert seconds < (0.45 if lean else 0.35) * 400
    assert drafted > 80


def test_a_tree_that_turns_out_to_cost_more_than_it_brings_is_given_up():
    controller = DraftController(MeasuredCosts(), lean=False)
    seconds, drafted = decode(controller, 400, 0.6, 1.0, 1.5, per_round=2)
    assert controller.lean
    assert drafted <= 10
    assert seconds < 1.05 * 400


def drafted_by(direct, ids, limit, cost):
    text = TokenText(torch.tensor(ids), len(ids) + 1)
    tree = TokenTree.at_end(text)
    direct.draft(tree, text, limit, cost)
    return [node.token for node in tree.draft_tokens], tree


def test_look_up_becomes_a_chain_that_grows_with_what_passes_are_seen_to_cost():
    stats = DecodeStats()
    direct = DirectDrafter(DraftSelector([NgramDrafter(1000)], MOST, adaptive=True), stats)
    ids = [*range(10, 60), 7, *range(10, 30)]
    lengths = []
    for _ in range(6):
        tokens, tree = drafted_by(direct, ids, 40, lambda count: 1.0 + 0.01 * count)
        assert tokens == list(range(30, 30 + len(tokens)))
        assert tree.root.candidates is None, "level 1 has nothing to learn from it"
        assert [node.parent for node in tree.draft_tokens] == [tree.root, *tree.draft_tokens[:-1]]
        direct.judged(len(tokens))
        lengths.append(len(tokens))
    assert lengths[:4] == [2, 4, 8, 16]
    assert max(lengths) == MOST
    assert (stats.draft.proposed, stats.draft.accepted) == (sum(lengths), sum(lengths))


def test_nothing_is_drafted_before_a_pass_has_been_seen_nor_beyond_the_limit():
    direct = DirectDrafter(DraftSelector([NgramDrafter(1000)], MOST, adaptive=True), DecodeStats())
    ids = [*range(10, 60), 7, *range(10, 30)]
    assert drafted_by(direct, ids, 40, None)[0] == []
    assert drafted_by(direct, ids, 0, lambda count: 1.0)[0] == []
    assert drafted_by(direct, ids, 1, lambda count: 1.0)[0] == [30]


def test_drafts_that_are_never_right_stop():
    direct = DirectDrafter(DraftSelector([NgramDrafter(1000)], MOST, adaptive=True), DecodeStats())
    ids, read = [5, 6, 9, 5, 6, 8, 5, 6], 0
    for _ in range(100):
        tokens, _ = drafted_by(direct, ids, 16, lambda count: 1.0 + 0.15 * count)
        direct.judged(0)
        read += len(tokens)
    assert read <= 20
