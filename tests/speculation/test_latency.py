"""The line through latencies: as if it were fitted anew each time, by Theil and Sen's estimator written out plainly."""

from __future__ import annotations

import itertools
import statistics

from hypothesis import given, settings
from hypothesis import strategies as st

from offload_triforce.speculation.latency import SAMPLES, LatencyFit

SECONDS = st.floats(0, 100).map(lambda seconds: round(seconds, 3))  # some of which are equal


def line(seen):
    """Intercept and slope."""
    pairs = [(one, other) for one, other in itertools.combinations(seen, 2) if one[0] != other[0]]
    slopes = [(other[1] - one[1]) / (other[0] - one[0]) for one, other in pairs]
    slope = max(0.0, statistics.median(slopes)) if slopes else 0.0
    return statistics.median(y - slope * x for x, y in seen), slope


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 9), SECONDS), min_size=1, max_size=3 * SAMPLES), st.integers(1, 9))
def test_it_is_the_line_through_the_latest(seen, every):
    """Bit for bit, however often it is asked in between."""
    fit = LatencyFit()
    for number, (tokens, seconds) in enumerate(seen):
        fit.add(tokens, seconds)
        if number % every == 0 or number == len(seen) - 1:
            latest = seen[max(0, number + 1 - SAMPLES) : number + 1]
            start, slope = line(latest)
            assert [fit.at(n) for n in (0, 1, 7, 200)] == [max(0.0, start + slope * n) for n in (0, 1, 7, 200)]
            assert fit.tells_sizes_apart == (len({x for x, _ in latest}) > 1)


def test_it_is_not_fitted_again_for_nothing():
    fit = LatencyFit()
    fit.add(3, 1.0)
    fit.add(5, 2.0)
    assert fit.at(4) == 1.5
    fit._slopes.clear()
    assert fit.at(4) == 1.5
