"""By what numbers a tree grows: the tree drafter goes by them, and the planner as it walks through its rounds."""

from __future__ import annotations

# A candidate with a lower path probability than this is not drafted, beside the best one of a place.
LEAST_PROBABILITY = 1 / 512
# Steps of more than SMALL tokens read multiples of SIZES: so few sizes that each can be captured as a CUDA graph.
SMALL, SIZES = 8, 4


def step_size(tokens: int) -> int:
    """The largest size of a step that is no more than so many tokens."""
    return tokens if tokens <= SMALL else tokens // SIZES * SIZES
