"""What the thread that decodes tells the event loop: how far the prompt is, and what the answer says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from offload_triforce.server.spelling import Speller
from offload_triforce.speculation.stats import DecodeStats


@dataclass(frozen=True)
class Progress:
    """How far the prompt has been read: ``processed`` tokens of ``total``, ``cached`` of them from before."""

    total: int
    cached: int
    processed: int
    time_ms: float


@dataclass(frozen=True)
class TokenLogprob:
    """A token's logarithm of its probability, and the likeliest ones at its place, best first."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Said:
    """Some text, and what is told of the tokens since the last one, if anybody asked."""

    text: str
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(frozen=True)
class Ended:
    """The answer is over: "stop" or "length", and by which stop string."""

    reason: str
    stop: str | None
    stats: DecodeStats


Event = Progress | Said | Ended


class Reporter:
    """Stopping criterion, streamer and progress of one answer, all called on the thread that decodes."""

    def __init__(
        self, speller: Speller, prompt_tokens: int, held: Callable[[], int], tell: Callable[[Any], None]
    ) -> None:
        """``held``: how many tokens of the prompt the caches hold. ``tell``: where events go, from any thread."""
        self.speller, self._total, self._held, self._tell = speller, prompt_tokens, held, tell
        self._began = time.monotonic()
        self._cached: int | None = None
        self._text, self._logprobs = "", []

    def begin(self) -> None:
        """The clock runs from here."""
        self._began = time.monotonic()

    def progress(self, done: int, steps: int) -> None:
        """Of the prefill. Its first call comes before anything new counts as held."""
        if self._cached is None:
            self._cached = min(self._held(), self._total)
        processed = self._cached + (self._total - self._cached) * done // max(1, steps)
        self._tell(Progress(self._total, self._cached, processed, 1e3 * (time.monotonic() - self._began)))

    def __call__(self, ids: Tensor, scores: Any) -> bool:
        """A stopping criterion: asked after each token, in the order of the text. ids: [1, n]."""
        self._text += self.speller.push(int(ids[0, -1]))
        return self.speller.watch.found is not None

    def put(self, tokens: Tensor) -> None:
        """A streamer's: told of each token, once its pass is over. The first call brings all that the pass said."""
        if self._text or self._logprobs:
            self.flush()

    def end(self) -> None:
        """A streamer's: nothing more comes."""
        self._text += self.speller.finish()
        if self._text or self._logprobs:
            self.flush()

    def flush(self) -> None:
        """Tell what there is."""
        self._tell(Said(self._text, self._logprobs))
        self._text, self._logprobs = "", []

    def watch_logprobs(self, top: int) -> Callable[[Tensor, int], None]:
        """What is called with the target's logits [1, V] and the token taken, once for each token in order."""

        def look(logits: Tensor, token: int) -> None:
            row = torch.log_softmax(logits[0].float(), dim=-1)
            best = row.topk(min(top, len(row))) if top else None
            pairs = [] if best is None else list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            self._logprobs.append(TokenLogprob(token, float(row[token]), pairs))

        return look


def to_loop(queue: asyncio.Queue[Any]) -> Callable[[Any], None]:
    """A way to put things into a queue of this event loop from any thread. A loop that is closed hears nothing."""
    loop = asyncio.get_running_loop()

    def tell(event: Any) -> None:
        try:
            loop.call_soon_threadsafe(queue.put_nowait, event)
        except RuntimeError:
            return

    return tell
