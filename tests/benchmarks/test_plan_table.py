"""The planner's tables: one cell is one plan, and the page keeps all else."""

from __future__ import annotations

import pytest

from benchmarks import plan_table
from benchmarks.plan_table import BEGIN, END, Cell, ask, describe, replaced, table

FITS = {
    "fits": True,
    "way": "hierarchy",
    "ms_per_token": 114.6,
    "ms_per_token_plain": 1604.2,
    "tokens_per_pass": 19.2,
    "host_bytes": 46.02e9,
}
CELL = Cell("llama-3.1-8b", "128K", "RTX 4090")


def test_a_cell_says_what_the_plan_says():
    assert describe(CELL, lambda options: FITS) == "**115** (1,604), 19 a pass, 46 GB"
    assert describe(CELL, lambda options: FITS | {"ms_per_token_plain": None}) == "**115**, 19 a pass, 46 GB"
    plain = FITS | {"way": "plain", "ms_per_token": None, "ms_per_token_plain": 23.7}
    assert describe(CELL, lambda options: plain) == "24 plain, 46 GB"
    assert describe(CELL, lambda options: None) == "does not fit"


@pytest.mark.parametrize("fitting", ["int8", "nf4", "nf4, int8 head"])
def test_weights_are_packed_as_little_as_will_do(fitting):
    asked = []

    def plan(options):
        asked.append(options[6:])
        return FITS | {"fits": asked[-1] == plan_table.PACKINGS[fitting]}

    assert describe(CELL, plan).startswith(f"{fitting}: **115**")
    assert asked == list(plan_table.PACKINGS.values())[: len(asked)]


def test_the_plan_is_asked_as_anybody_would():
    told = ask(("--model", "llama-3.1-8b", "--context", "32K", "--gpu", "RTX 5090"))
    assert told["fits"]
    assert told["context"] == 32768
    assert ask(("--model", "llama-3.1-8b", "--gpu", "no such card")) is None


def test_unknown_models_are_left_out_and_named():
    said = []
    made = table({"no-such-model": ("128K",), "qwen3-8b": ("32K", "40K")}, said.append, lambda options: FITS)
    assert said[0].startswith("no-such-model is not known")
    assert len(made.splitlines()) == 4
    assert made.count("**115**") == 2 * len(plan_table.CARDS)


def test_the_page_keeps_all_else():
    page = f"before\n{BEGIN.format('a')}\nold\n{END.format('a')}\nafter\n"
    made = replaced(page, {"a": "| new |"})
    assert made == f"before\n{BEGIN.format('a')}\n\n| new |\n\n{END.format('a')}\nafter\n"
    assert replaced(made, {"a": "| new |"}) == made
    with pytest.raises(ValueError, match="has no table"):
        replaced(page, {"b": "x"})


def test_the_page_has_room_for_them():
    page = plan_table.PAGE.read_text()
    for name in ("long contexts", "models of 2026"):
        assert page.count(BEGIN.format(name)) == page.count(END.format(name)) == 1
