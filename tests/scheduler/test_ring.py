"""The ring: regions in use never overlap, and there is always room for the next tile in the end."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload_triforce.scheduler.ring import Ring


@given(st.integers(1, 40), st.lists(st.integers(1, 40), max_size=60))
def test_regions_in_use_never_overlap_and_none_waits_for_ever(total, sizes):
    """Sizes as they come; whatever does not fit has to wait for the oldest ones, and for no more than all of them."""
    ring, used = Ring(torch.arange(total)), deque()
    ring.begin("at first")
    given_back = "at first"
    for size in sizes:
        if size > total:
            assert ring.take(size) is None
            continue
        while (room := ring.take(size)) is None:
            used.popleft()  # raises if there is none left to wait for
            given_back = len(used)
            ring.give_back(given_back)
        region, free = room
        assert free == given_back, "whoever waits for the newest event has waited for all"
        assert len(region) == size
        for other in used:
            assert not set(other.tolist()) & set(region.tolist())
        used.append(region)


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_of_equal_sizes_all_of_it_is_used(slots):
    ring = Ring(torch.arange(3 * slots))
    ring.begin(0)
    places = [ring.take(3)[0].tolist() for _ in range(slots)]
    assert [number for place in places for number in place] == list(range(3 * slots))
    for turn in range(2 * slots):
        assert ring.take(3) is None
        ring.give_back(turn)
        region, free = ring.take(3)
        assert (region.tolist(), free) == (places[turn % slots], turn)


def test_a_pass_that_was_interrupted_leaves_nothing_behind():
    ring = Ring(torch.arange(6))
    ring.begin(0)
    assert [ring.take(3) is not None for _ in range(3)] == [True, True, False]
    ring.begin(1)
    assert [ring.take(3) is not None for _ in range(3)] == [True, True, False]
