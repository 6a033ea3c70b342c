"""What is found out on the way: odds of candidates, costs, and what follows from them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_triforce.scheduler.pipeline import Slack
from offload_triforce.speculation.acceptance import Ranking
from offload_triforce.speculation.adaptive import (
    PRIOR_WEIGHT,
    AcceptanceModel,
    DraftController,
    GivenCosts,
    MeasuredCosts,
)
from offload_triforce.speculation.latency import LatencyFit

SURE = Ranking([9.0, 1.0], [7, 8])  # candidates 7 and 8
PRIOR = ((0.5,) * 16, (0.2,) * 16)


def test_history_begins_with_the_prior_and_ends_with_what_was_seen():
    acceptance = AcceptanceModel(PRIOR)
    assert acceptance.ranks == 2
    assert acceptance.chance(SURE, 0) == 0.5
    acceptance.learn(SURE, 7)
    assert acceptance.chance(SURE, 0) == pytest.approx((0.5 * PRIOR_WEIGHT + 1) / (PRIOR_WEIGHT + 1))
    assert acceptance.chance(SURE, 1) == pytest.approx(0.2 * PRIOR_WEIGHT / (PRIOR_WEIGHT + 1))
    for _ in range(4000):
        acceptance.learn(SURE, 8)
    assert acceptance.chance(SURE, 0) == pytest.approx(0, abs=0.01)
    assert acceptance.chance(SURE, 1) == pytest.approx(1, abs=0.01)


def test_kinds_are_told_apart():
    acceptance = AcceptanceModel(PRIOR)
    unsure = Ranking([1.0, 0.99], [7, 8])
    for _ in range(50):
        acceptance.learn(unsure, 3)
    assert acceptance.chance(unsure, 0) < 0.2
    assert acceptance.chance(SURE, 0) == 0.5


@given(st.floats(0.001, 1), st.floats(0.0001, 0.1), st.lists(st.integers(1, 200), min_size=8, max_size=40, unique=True))
def test_costs_find_a_line_in_spite_of_outliers(base, slope, sizes):
    costs = LatencyFit()
    assert not costs
    for number, size in enumerate(sizes):
        costs.add(size, base + slope * size + (20.0 if number == 3 else 0.0))  # one was a hundred times slower
    assert costs
    if len(sizes) >= 20:
        assert costs.at(50) == pytest.approx(base + slope * 50, rel=0.05)
        assert costs.per_token == pytest.approx(slope, rel=0.05)
    assert costs.at(0) >= 0


def test_costs_of_one_size_are_its_median():
    costs = LatencyFit()
    for seconds in (9.0, 1.0, 2.0):
        costs.add(4, seconds)
    assert (costs.at(4), costs.per_token) == (2.0, 0.0)


def test_measured_pace():
    """Two rounds: 3 s of drafting and a pass of 7 s for 5 tokens, then 2 s and 8 s for 15."""
    controller = DraftController(MeasuredCosts())
    assert not controller.known
    controller.step(4, 2.5, 0.5, hidden=False)
    controller.round(9, 7.0, 5, Slack(0.0, 0.0))
    controller.step(4, 2.0, 0.0, hidden=False)
    controller.step(4, 2.0, 0.0, hidden=True)  # costs nothing
    controller.round(9, 8.0, 15, Slack(6.0, 9.0))
    assert controller.known
    assert controller.value == pytest.approx(20 / 20)
    assert controller.step_cost(4) == 2.0, "the draft's own time is not the step's"


def test_what_is_hidden_has_to_have_time():
    """The last pass left 8 s: so there is time for four steps of 2 s, if the ring covers one."""
    controller = DraftController(MeasuredCosts())
    assert not controller.has_time(4), "nothing is known yet"
    controller.step(4, 2.0, 0.0, hidden=True)
    for longest, expected in ((1.7, 4), (1.5, 0), (0.0, 0)):
        controller.round(9, 8.0, 15, Slack(8.0, longest))
        steps = 0
        while controller.has_time(4):
            controller.step(4, 2.0, 0.0, hidden=True)
            steps += 1
        assert steps == expected


def test_rounds_in_which_kernels_are_compiled_are_no_measure():
    """Of 7 rounds of 10 tokens, the first takes 20 s, all others 1 s."""
    controller, given = DraftController(MeasuredCosts()), DraftController(GivenCosts(0.5))
    for seconds in (20.0, *(1.0 for _ in range(6))):
        controller.round(5, seconds, 10, Slack(0.0, 0.0))
        given.round(5, seconds, 10, Slack(0.0, 0.0))
    assert controller.value == pytest.approx(0.1)
    assert given.value == pytest.approx(1 / 10), "passes, not seconds"


def test_given_pace_needs_no_clock():
    """A step costs a tenth of a pass, whatever it took."""
    controller = DraftController(GivenCosts(0.1))
    for _ in range(5):
        controller.step(3, 99.0, 99.0, hidden=False)
    controller.round(9, 1e-3, 6, Slack(123.0, 0.0))
    assert controller.value == pytest.approx(1.5 / 6)
    assert (controller.step_cost(3), controller.step_cost(99)) == (0.1, 0.1)
    assert (controller.least_in_step, controller.least_in_pass) == (0.0, 0.0), "one more token costs nothing"
    steps = 0
    while controller.has_time(3):
        controller.step(3, 99.0, 99.0, hidden=True)
        steps += 1
    assert steps in (9, 10), "a pass hides what adds up to a pass"


def test_what_one_more_token_has_to_be_worth():
    """A step takes 1 s and 0.1 s per token; a pass 5 s, and 0.2 s per node as soon as that can be told."""
    controller = DraftController(MeasuredCosts())
    assert (controller.least_in_step, controller.least_in_pass) == (0.0, 0.0)
    controller.step(2, 1.2, 0.0, hidden=False)
    controller.step(5, 1.5, 0.0, hidden=False)
    assert controller.least_in_step == controller.least_in_pass == pytest.approx(0.1 / 1.1), (
        "a token is worth a step, no less"
    )
    controller.round(10, 7.0, 4, Slack(0.0, 0.0))
    value = (2.7 + 7) / 4
    assert controller.least_in_step == controller.least_in_pass == pytest.approx(0.1 / value)
    controller.round(20, 9.0, 4, Slack(0.0, 0.0))
    value = (2.7 + 7 + 9) / 8
    assert controller.least_in_step == pytest.approx(0.1 / value)
    assert controller.least_in_pass == pytest.approx(0.2 / value)
