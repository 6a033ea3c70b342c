"""How far the target follows a tree, by how often it takes level 1's k-th choice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_triforce.planner import acceptance_length as al
from offload_triforce.planner.acceptance_length import (
    AcceptanceByRank,
    Draws,
    Growth,
    mean_acceptance_length,
    of_coupled,
    of_resampled,
)
from offload_triforce.scheduler.simulate import chain
from offload_triforce.speculation.acceptance import RESAMPLING_PRIOR
from offload_triforce.speculation.tree_drafter import LEAST_PROBABILITY

RESULTS = Path(__file__).parents[2] / "benchmarks/results/retrieval_cpu.json"


def one_class(*shares):
    return AcceptanceByRank((1.0,), (shares,))


def test_the_table_is_what_was_measured():
    taken = json.loads(RESULTS.read_text())["taken"]
    assert taken["cases"][0] == taken["cases"][1] == list(al.PLACES), "the second is as far behind as the first leads"
    assert (taken["hits"][0], taken["hits"][1]) == (list(al.FIRST), list(al.SECOND))
    missed = sum(al.PLACES) - sum(al.FIRST) - sum(al.SECOND)
    third, fourth = (int(sum(row)) for row in taken["hits"][2:])
    assert (third, fourth, missed - third - fourth) == al.LATER
    assert {row[0] for row in RESAMPLING_PRIOR} == set(al.DRAWN)
    assert al.LEAST_PROBABILITY == LEAST_PROBABILITY


def test_it_fits_what_was_measured_at_other_budgets():
    """Among the first of 1 to 4 choices, with a half, twice and four times the memory: within a point."""
    rows = {row["way"]: row["among_first"]["0.6"] for row in json.loads(RESULTS.read_text())["rows"]}
    for way in ("memory x1, 8 bits", "memory x2, 4 bits", "memory x4, 4 bits", "once"):
        among, ranks = rows[way], of_coupled().scaled(rows[way][0]).ranks
        assert [sum(ranks[: k + 1]) for k in range(4)] == pytest.approx(among, abs=0.015), way


@given(st.floats(0, 1))
def test_scaled_takes_the_first_choice_that_often(first):
    for table in (of_coupled(), of_resampled()):
        scaled = table.scaled(first)
        assert scaled.ranks[0] == pytest.approx(first, abs=1e-6)
        assert all(sum(row) <= 1 + 1e-9 and min(row) >= 0 for row in scaled.shares)
        assert first > 0.999 or all(0 <= later < 1 - first for later in scaled.ranks[1:])


def test_split_takes_each_choice_that_often():
    ranks = (0.9, 0.06, 0.01, 0.02)
    assert of_coupled().split(ranks).ranks == pytest.approx(ranks)
    assert of_coupled().split((1.0, 0.0, 0.0, 0.0)).ranks == pytest.approx((1, 0, 0, 0))


@pytest.mark.parametrize("rate", [0.0, 0.6, 0.93, 1.0])
def test_chains_are_geometric(rate):
    assert mean_acceptance_length(one_class(rate), 12, 1, 12) == pytest.approx(chain(rate, 12))
    assert mean_acceptance_length(of_coupled().scaled(rate), 12, 1, 12) == pytest.approx(chain(rate, 12), rel=0.03)


def test_a_tree_by_hand():
    """Of shares 0.6 and 0.3, the likeliest three: 0.6, then 0.36 behind it, then 0.3 beside it; two deep at most, 0.18
    comes fourth, twice."""
    table = one_class(0.6, 0.3)
    for nodes, chances in ((1, [0.6]), (3, [0.6, 0.36, 0.3]), (5, [0.6, 0.36, 0.3, 0.18, 0.18])):
        assert mean_acceptance_length(table, nodes, 2, 2) == pytest.approx(1 + sum(chances))
    assert mean_acceptance_length(table, 3, 1, 2) == pytest.approx(1 + 0.6 + 0.36), "no second choices"
    assert mean_acceptance_length(table, 3, 2, 1) == pytest.approx(1 + 0.6 + 0.3), "one token deep"


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 20))
def test_more_room_never_costs(nodes, topk, gamma):
    table = one_class(0.7, 0.15, 0.05, 0.02)
    found = mean_acceptance_length(table, nodes, topk, gamma)
    assert found <= min(gamma, nodes) + 1
    for more in ((nodes + 7, topk, gamma), (nodes, topk + 1, gamma), (nodes, topk, gamma + 3)):
        assert mean_acceptance_length(table, *more) >= found - 1e-9


def test_places_of_different_kinds_are_worth_more_than_one_of_their_mean():
    """Where level 1 is sure, the tree gets long; where it is not, wide."""
    table = of_coupled()
    mixed, alike = (mean_acceptance_length(t, 192, 4, 48) for t in (table, one_class(*table.ranks)))
    assert mixed > 1.08 * alike


def test_what_hangs_below_a_place_is_kept():
    growth = Growth(Draws(one_class(0.5, 0.25)), 2, 100)
    growth.read(growth.leaves(1, 5, 0.0)[0])
    first, second = growth.root.children
    growth.read(first)
    growth.begin(first)
    assert sorted((place.chance, place.depth) for place in growth.draft_tokens) == [(0.25, 1), (0.5, 1)]
    assert (growth.root.chance, growth.root.depth, growth.held) == (1.0, 0, 1)
    assert second not in growth.draft_tokens


def test_leaves_are_the_likeliest_that_are_of_use():
    growth = Growth(Draws(one_class(0.6, 0.3)), 2, 2)
    assert growth.leaves(3, 4, 0.0) == [growth.root]
    growth.read(growth.root)
    first, second = growth.root.children
    assert growth.leaves(3, 4, 0.0) == [first], "two at most, and what follows the second is likelier by none of them"
    growth.limit(10)
    growth.put_back([first])
    assert growth.leaves(3, 1, 0.0) == [], "none is deeper than that"
    assert growth.leaves(3, 4, 0.4) == [first]
    assert growth.leaves(3, 4, 0.0) == [second]
