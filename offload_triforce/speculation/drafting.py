"""Which draft guesses, and how far: whichever gets the retrieval level ahead fastest, or nobody where none pays."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from offload_triforce.speculation.draft import Draft
from offload_triforce.speculation.economy import Costs
from offload_triforce.speculation.place import PathState
from offload_triforce.speculation.rules import Guess
from offload_triforce.speculation.text import TokenText

# Acceptance of a guess of each kind, before anything has been seen; as many observations as PRIOR_WEIGHT.
PRIOR = {"ngram 2": 0.3, "ngram 4": 0.45, "ngram 8": 0.65, "ngram 16": 0.8, "ngram 32": 0.9, "model": 0.6}
PRIOR_WEIGHT = 4.0
# A kind that does not pay is tried again after so many times.
RETRY = 32


class Drafting:
    """Asks the drafts for guesses, and learns from what becomes of them."""

    def __init__(self, drafts: Sequence[Draft], most: int, adaptive: bool, timed: bool = True) -> None:
        """``most``: guesses at a time. Without ``adaptive``, the first draft that can guess makes as many as that.

        ``timed``: whether the time that the drafts themselves take counts.
        """
        self._drafts, self._most, self._adaptive, self._timed = drafts, most, adaptive, timed
        self._accepted = {kind: PRIOR_WEIGHT * rate for kind, rate in PRIOR.items()}
        self._judged = dict.fromkeys(PRIOR, PRIOR_WEIGHT)
        self._declined = dict.fromkeys(PRIOR, 0)
        self._costs = [Costs() for _ in drafts]
        self._kind = ""

    def guess(
        self,
        text: TokenText,
        limit: int,
        step_cost: Callable[[int], float] | None,
        before: PathState | None = None,
    ) -> list[Guess]:
        """Up to ``limit`` guesses of the draft that serves best here.

        Args:
            text, before: see ``Draft.guess``. limit: most guesses.
            step_cost: what a step of the retrieval level costs with so many guesses to read; None if it is not known.
        """
        limit = min(limit, self._most)
        if limit < 1:
            return []
        best: tuple[float, int, int, str] | None = None
        for index, draft in enumerate(self._drafts):
            kind = draft.offer(text)
            if kind is None:
                continue
            if not self._adaptive or step_cost is None:
                best = (0.0, index, limit, kind)
                break
            speed, count = self._count(kind, limit, step_cost, self._costs[index])
            if best is None or speed > best[0]:
                best = (speed, index, count, kind)
        if best is None:
            return []
        _, index, count, self._kind = best
        if not count:
            return []
        started = time.perf_counter()
        guesses = self._drafts[index].guess(text, count, before)
        if self._timed:
            self._costs[index].add(len(guesses), time.perf_counter() - started)
        return guesses

    def learn(self, proposed: int, accepted: int) -> None:
        """What became of the last guesses. Those after the first rejected one are not judged."""
        self._accepted[self._kind] += accepted
        self._judged[self._kind] += min(proposed, accepted + 1)

    def _count(self, kind: str, limit: int, step_cost: Callable[[int], float], costs: Costs) -> tuple[float, int]:
        """How fast the retrieval level gets ahead with the best number of guesses, and that number."""
        rate = self._accepted[kind] / self._judged[kind]
        alone, ahead, reached = 1 / max(step_cost(0), 1e-9), 1.0, 1.0
        best = (alone, 0)
        for count in range(1, limit + 1):
            reached *= rate
            ahead += reached
            taken = step_cost(count) + (costs.at(count) if costs else 0.0)
            best = max(best, (ahead / max(taken, 1e-9), count))
        if best[1] == 0:
            self._declined[kind] += 1
            if self._declined[kind] % RETRY == 0:
                return alone, 1
        return best
