"""How long a number of tokens takes: a straight line through what was seen, kept up to date as more is seen."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence

# So many observations count.
SAMPLES = 48


class LatencyFit:
    """A straight-line fit of latency: seconds over a number of tokens, by the median of what was seen.

    It is Theil and Sen's estimator, the median of the slopes between all pairs, which a few slow outliers do not move.
    One more observation brings SAMPLES of the thousand slopes, and ends as many: they are put into a sorted list and
    taken out of it, since each step of the retrieval level adds an observation and asks at once.
    """

    def __init__(self) -> None:
        self._seen: deque[tuple[int, float]] = deque()
        self._slopes: list[float] = []  # between all pairs of different sizes, ascending
        self._line: tuple[float, float] | None = None

    def add(self, tokens: int, seconds: float) -> None:
        """It took that long."""
        if len(self._seen) == SAMPLES:
            for slope in self._to_others(*self._seen.popleft()):
                del self._slopes[bisect_left(self._slopes, slope)]
        for slope in self._to_others(tokens, seconds):
            insort(self._slopes, slope)
        self._seen.append((tokens, seconds))
        self._line = None

    def __bool__(self) -> bool:
        return bool(self._seen)

    def at(self, tokens: int) -> float:
        """Seconds for that many tokens."""
        if self._line is None:
            slope = max(0.0, _middle(self._slopes)) if self._slopes else 0.0
            self._line = _middle(sorted(y - slope * x for x, y in self._seen)), slope
        return max(0.0, self._line[0] + self._line[1] * tokens)

    @property
    def tells_sizes_apart(self) -> bool:
        """Whether more than one number of tokens has been seen."""
        return bool(self._slopes)

    @property
    def per_token(self) -> float:
        """Seconds that one more token takes."""
        return self.at(2) - self.at(1)

    def _to_others(self, tokens: int, seconds: float) -> list[float]:
        """Slopes between one observation and all those held; the same number from either end, to the last bit."""
        return [(seconds - y) / (tokens - x) for x, y in self._seen if x != tokens]


def _middle(ascending: Sequence[float]) -> float:
    """The median of numbers in order."""
    half, odd = divmod(len(ascending), 2)
    return ascending[half] if odd else (ascending[half - 1] + ascending[half]) / 2
