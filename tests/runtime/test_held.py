"""Checkpoints within a limit of memory."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from offload_triforce.runtime.held import Checkpoint, thin


def points(*tokens, size=10):
    return [Checkpoint(count, {"state": torch.zeros(size, dtype=torch.uint8)}) for count in tokens]


def left(found):
    return [point.tokens for point in found]


def test_the_closest_in_the_middle_go_first():
    text = points(100, 200, 210, 220, 400, 900)
    assert left(thin(text, 60)) == [100, 200, 210, 220, 400, 900]
    assert left(thin(text, 50)) == [100, 200, 220, 400, 900]
    assert left(thin(text, 30)) == [100, 400, 900]


@given(st.sets(st.integers(1, 10**6), min_size=1, max_size=30), st.integers(0, 400))
def test_first_and_last_stay_and_the_limit_is_kept(tokens, limit):
    text = points(*sorted(tokens))
    found = left(thin(text, limit))
    assert (found[0], found[-1]) == (min(tokens), max(tokens))
    assert set(found) <= tokens
    assert len(found) == min(len(tokens), max(limit // 10, min(2, len(tokens))))
