"""Level 1 rests where it does not pay: what finding that out costs, by the count."""

from __future__ import annotations

import pytest

from offload_triforce.scheduler.pipeline import Slack
from offload_triforce.speculation.adaptive import DraftController, MeasuredCosts
from offload_triforce.speculation.trials import REST, Trials

NOTHING = Slack()
STEPS = 3  # of a round with level 1


def decode(controller, tokens, step, bare, tree_pass, per_round):
    """So many tokens by a clock of its own: seconds, and rounds with steps."""
    seconds = made = tried = 0
    while made < tokens:
        controller.begin_round()
        spent, new, took = 0.0, 1, bare
        if not controller.rests:
            tried += 1
            for number in range(STEPS):
                controller.step(1, step, 0.0, hidden=False)
                spent += step
                if number == 0 and controller.gives_up():
                    break
            else:
                new, took = per_round, tree_pass
        controller.round(new, took, new, NOTHING)
        seconds += spent + took
        made += new
    return seconds, tried


def controller():
    return DraftController(MeasuredCosts(), Trials())


@pytest.mark.parametrize("tokens", [40, 128, 512])
@pytest.mark.parametrize("step", [0.5, 0.8, 1.0, 1.5])
def test_where_a_step_costs_much_of_a_pass_a_trial_is_one_step(step, tokens):
    seconds, tried = decode(controller(), tokens, step, 1.0, 1.3, per_round=3)
    assert seconds <= tokens + step * tried
    assert seconds <= 1.05 * tokens
    assert tried > 0


@pytest.mark.parametrize("tokens", [128, 512])
@pytest.mark.parametrize("per_round", [1, 2])
def test_a_tree_that_turns_out_to_cost_more_than_it_brings_is_given_up(per_round, tokens):
    tried = controller()
    seconds, rounds = decode(tried, tokens, 0.4, 1.0, 1.5, per_round)
    assert tried.rests
    assert rounds > 0
    assert seconds < 1.05 * tokens


def test_it_is_tried_less_and_less_often():
    one = controller()
    rounds = [decode(one, 512, 1.0, 1.0, 1.3, 3)[1] for _ in range(4)]
    assert rounds[0] >= 2
    assert sum(rounds[1:]) <= 2


def test_where_it_pays_level_1_drafts():
    tried = controller()
    seconds, rounds = decode(tried, 400, 0.05, 1.0, 1.1, per_round=4)
    assert not tried.rests
    assert seconds < 1.05 * REST + (400 - REST) * (3 * 0.05 + 1.1) / 4
    assert rounds > 80


def test_a_trial_that_is_given_up_is_no_round_without_level_1():
    trials = Trials()
    for _ in range(REST):
        trials.begin()
        trials.round(1, 1.0)
    trials.begin()
    assert not trials.resting
    assert trials.too_dear(40.0)
    trials.round(1, 41.0)
    for _ in range(4 * REST):
        trials.begin()
        assert trials.resting
        trials.round(1, 1.0)
    trials.begin()
    assert not trials.resting
    assert trials.too_dear(0.6)


def test_costs_that_are_settled_are_nothing_to_try():
    settled = DraftController(MeasuredCosts())
    assert not settled.rests
    assert decode(settled, 40, 2.0, 1.0, 1.0, 1)[1] == 40
