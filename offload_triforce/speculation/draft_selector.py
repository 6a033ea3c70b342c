"""Which drafter drafts, and how far: whichever gets the retrieval level ahead fastest, or nobody where none pays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from offload_triforce.scheduler.clock import Clock, Mark
from offload_triforce.speculation.acceptance import DraftToken
from offload_triforce.speculation.latency import LatencyFit
from offload_triforce.speculation.place import PathState
from offload_triforce.speculation.text import TokenText

# Acceptance of a draft token of each kind, before anything has been seen; as many observations as PRIOR_WEIGHT.
PRIOR = {"ngram 2": 0.3, "ngram 4": 0.45, "ngram 8": 0.65, "ngram 16": 0.8, "ngram 32": 0.9, "model": 0.6, "mtp": 0.7}
PRIOR_WEIGHT = 4.0
# A kind that does not pay is tried again after so many times.
RETRY = 32


class Drafter(Protocol):
    """A drafter, level 0: drafts how a text goes on."""

    def offer(self, text: TokenText) -> str | None:
        """The kind of draft that can be made of this text, by how sure it is; None if none can."""

    def draft(self, text: TokenText, count: int, before: PathState | None = None) -> list[DraftToken]:
        """Up to ``count`` draft tokens for the text that ``offer`` has just seen. The text stays as it is.

        ``before``: of forkable logits processors, at the place before the text's last token; None where the target was.
        """


class DraftSelector:
    """Selects the drafter to ask for draft tokens, and learns from what becomes of them."""

    def __init__(self, drafts: Sequence[Drafter], most: int, adaptive: bool, clock: Clock | None = None) -> None:
        """``most``: draft tokens at a time. Without ``adaptive``, the first drafter that can makes as many.

        ``clock``: what the drafters themselves are timed by; None if their time does not count.
        """
        self._drafts, self._most, self._adaptive, self._clock = drafts, most, adaptive, clock
        self._untold: tuple[LatencyFit, int, Mark, Mark] | None = None  # the latest draft's time, which nobody has seen
        self._accepted = {kind: PRIOR_WEIGHT * rate for kind, rate in PRIOR.items()}
        self._judged = dict.fromkeys(PRIOR, PRIOR_WEIGHT)
        self._declined = dict.fromkeys(PRIOR, 0)
        self._costs = [LatencyFit() for _ in drafts]
        self._kind = ""  # of the latest draft

    def draft(
        self,
        text: TokenText,
        limit: int,
        step_cost: Callable[[int], float] | None,
        before: PathState | None = None,
    ) -> list[DraftToken]:
        """Up to ``limit`` draft tokens of the drafter that serves best here.

        Args:
            text, before: see ``Drafter.draft``. limit: most draft tokens.
            step_cost: what a step of the retrieval level costs with so many of them to read; None if it is not known.
        """
        limit = min(limit, self._most)
        if limit < 1:
            return []
        self._tell_time()
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
        began = self._clock.mark() if self._clock is not None else None
        drafted = self._drafts[index].draft(text, count, before)
        if began is not None:
            self._untold = self._costs[index], len(drafted), began, self._clock.mark()
        return drafted

    def _tell_time(self) -> None:
        if self._untold is not None:
            costs, tokens, began, ended = self._untold
            costs.add(tokens, ended.since(began))
            self._untold = None

    @property
    def name(self) -> str:
        """Of the drafter that made the latest draft: what its kinds begin with."""
        return self._kind.partition(" ")[0]

    def learn(self, proposed: int, accepted: int) -> None:
        """What became of the last draft tokens. Those after the first rejected one are not judged."""
        self._accepted[self._kind] += accepted
        self._judged[self._kind] += min(proposed, accepted + 1)

    def _count(self, kind: str, limit: int, step_cost: Callable[[int], float], costs: LatencyFit) -> tuple[float, int]:
        """How fast the retrieval level gets ahead with the best number of draft tokens, and that number."""
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
