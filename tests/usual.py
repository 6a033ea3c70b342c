"""Which cases of a wide sweep the normal run takes: a sample of them. The whole sweep is marked ``slow``."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def sampled(*axes: Sequence[Any], share: int) -> list[Any]:
    """Every combination of the axes' values, one in ``share`` for the normal run: there, each value comes up.

    Args:
        axes: values of one parameter each; a tuple stands for several.

    Raises:
        ValueError: a value that would be in none of the normal run's cases.
    """
    cases, seen = [], [set() for _ in axes]
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        usual = sum(places) % share == 0
        if usual:
            for place, of_axis in zip(places, seen, strict=True):
                of_axis.add(place)
        values = [axis[place] for axis, place in zip(axes, places, strict=True)]
        flat = itertools.chain.from_iterable(value if type(value) is tuple else (value,) for value in values)
        cases.append(pytest.param(*flat, marks=() if usual else pytest.mark.slow))
    if any(len(of_axis) < len(axis) for axis, of_axis in zip(axes, seen, strict=True)):
        raise ValueError(f"one in {share} leaves values out")
    return cases


def first(usual: int, cases: Iterable[Any]) -> list[Any]:
    """Cases of which the first few are enough for the normal run: seeds, say, which differ in nothing but chance."""
    marks = itertools.chain(itertools.repeat((), usual), itertools.repeat(pytest.mark.slow))
    return [pytest.param(case, marks=marks_of) for case, marks_of in zip(cases, marks, strict=False)]
