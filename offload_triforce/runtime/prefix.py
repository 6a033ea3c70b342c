"""From where a text is read on: how much of a prompt is held already, and how far back the caches can go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from offload_triforce.model.prefill import Progress
from offload_triforce.runtime.held import Checkpoint
from offload_triforce.runtime.runtime import PREFILL_QUERIES


class Start(NamedTuple):
    """So many tokens stay. ``checkpoint``: of just those, where the caches cannot be cut without.

    ``part``: behind them a prefill goes on that was stopped, as if it had read so many tokens whole; 0: none does.
    """

    tokens: int
    checkpoint: Checkpoint | None = None
    part: int = 0

    @property
    def worth(self) -> int:
        """Reading so many tokens is saved."""
        return self.tokens + self.part


def find_start(
    held: int, checkpoints: Sequence[Checkpoint], shared: int, wanted: int, can_cut: Callable[[int], bool]
) -> Start | None:
    """From where to read on to ``wanted`` tokens; None from the beginning.

    A text is cut some tokens before its end, where that can be: the retrieval cache has to choose anew, and it chooses
    by the newest queries. After a checkpoint, that may have to wait for the first pass.

    Args:
        held: tokens of the text. checkpoints: of it.
        shared: tokens that it has in common with what is wanted.
        can_cut: whether the text can be cut to so many tokens without a checkpoint.
    """
    if shared == held:
        return Start(shared) if shared else None
    most = min(shared, wanted - PREFILL_QUERIES)
    if most > 0 and can_cut(most):
        return Start(most)
    known = [point for point in checkpoints if point.tokens <= shared]
    return Start(known[-1].tokens, known[-1]) if known else None


class Told:
    """Progress of a prefill in groups, told as that of one: (steps done, steps in all)."""

    def __init__(self, progress: Progress | None, layers: int, chunk: int, groups: Sequence[int]) -> None:
        """``groups``: tokens of each; ``chunk``: of a step, through one of the ``layers``."""
        self._progress = progress
        self._steps = [layers * -(-tokens // chunk) for tokens in groups]
        self._before, self._total = 0, sum(self._steps)

    def __call__(self, done: int, _: int) -> None:
        """So much of the present group."""
        if self._progress is not None:
            self._progress(self._before + done, self._total)

    def group_done(self) -> None:
        """The next one follows."""
        self._before += self._steps.pop(0)
