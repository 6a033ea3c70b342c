"""What a pass computes: what is taken apart adds up."""

from __future__ import annotations

from offload_triforce.bench.work import PASS, Works, median_work, split
from offload_triforce.scheduler.device import COMPUTE
from offload_triforce.scheduler.simulate import PassWork
from offload_triforce.scheduler.trace import Span


def test_a_time_line_is_taken_apart():
    """2 layers of 2 tiles: 1 s before the first, 3 s in between, 5 s after; tiles take 1 s, one after a pause."""
    tiles = [(2.0, 3.0), (3.0, 4.0), (7.0, 8.0), (8.5, 9.5)]
    spans = [Span(PASS, PASS, 1.0, 14.5), *(Span(COMPUTE, "", *times) for times in tiles)]
    assert split(spans, 2, 2) == [1.0, 3.0, 5.0, (2.0 + 2.5) / 4]
    assert sum(split(spans, 2, 2)[:3]) + 4 * 4.5 / 4 == 13.5, "nothing is lost"


def test_between_what_was_measured_are_straight_lines():
    works = Works.__new__(Works)
    works._seen = {1: PassWork((1.0, 2.0), 0.5), 5: PassWork((3.0, 2.0), 1.5), 9: PassWork((3.0, 4.0), 1.5)}
    assert works.of(3) == PassWork((2.0, 2.0), 1.0)
    assert works.of(7) == PassWork((3.0, 3.0), 1.5)
    assert works.of(9) == works._seen[9]
    works._seen = {1: PassWork((1.0, 2.0), 0.5)}
    assert works.of(1) == works._seen[1]


def test_each_piece_counts_with_its_median():
    assert median_work([[1.0, 9.0, 2.0], [3.0, 8.0, 4.0], [2.0, 7.0, 9.0]]) == PassWork((2.0, 8.0), 4.0)
