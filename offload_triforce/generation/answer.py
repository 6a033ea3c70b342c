"""An answer, finished or still coming."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from offload_triforce.generation.detokenize import Detokenizer, decode_text
from offload_triforce.speculation.stats import DecodeStats

SHOWN = 60  # characters of an answer in its repr


@dataclass(frozen=True, repr=False)
class Generation:
    """A finished (or interrupted) answer.

    Attributes:
        text: of the answer's tokens by themselves; empty when there is no tokenizer.
        token_ids: of the answer. prompt_ids: of the prompt.
        stats: what was counted.
        finish_reason: why it ended: "stop" (an end-of-text token), "length" (of the answer, or of all), "stop_string",
            "max_time", the name of a stopping criterion of the caller's, or "interrupted"; None while it is coming.
    """

    text: str
    token_ids: list[int]
    prompt_ids: list[int]
    stats: DecodeStats
    finish_reason: str | None = None

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= SHOWN else f"{self.text[: SHOWN - 3]}..."
        counts = f"{len(self.prompt_ids):,} prompt tokens, {len(self.token_ids):,} new tokens"
        return f"Generation({text!r}, {counts}, finish_reason={self.finish_reason!r})"

    @property
    def sequences(self) -> Tensor:
        """Prompt and answer as transformers returns them, [1, n]."""
        return torch.tensor([self.prompt_ids + self.token_ids], device="cpu")


class TextStream:
    """An answer while it comes: iterate for the pieces of text, then (or at any time) look at ``result``.

    It may be left at any piece: dropped, or closed, which ``with engine.stream(...) as stream`` does in any case.
    """

    def __init__(
        self,
        tokens: Iterator[list[int]],
        prompt: Tensor,
        tokenizer: PreTrainedTokenizerBase | None,
        stats: DecodeStats,
        streamer: BaseStreamer | None,
        cancel: Callable[[], None],
        release: Callable[[], None],
    ) -> None:
        """See the engine.

        Args:
            tokens: what each pass yields. prompt: (n,) ids.
            stats: filled in as the tokens come.
            cancel: makes ``tokens`` end soon. release: lets the next answer begin, if ``tokens`` never begins.
        """
        self.stats = stats
        self.token_ids: list[int] = []
        self._tokens, self._prompt, self._tokenizer = tokens, prompt, tokenizer
        self._cancel, self._release = cancel, release
        # It does not know this object, which else would be in a cycle, and outlive its last reader for some time.
        self._pieces = _pieces(tokens, self.token_ids, prompt, tokenizer, stats, streamer)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def cancel(self) -> None:
        """End it at the next pass or chunk of the prompt, quietly; ``stats.interrupted`` tells. From any thread."""
        self._cancel()

    def close(self) -> None:
        """End it here, and let the next answer begin. If another thread is reading it, it ends as if cancelled."""
        self._cancel()
        try:
            self._pieces.close()
            self._tokens.close()  # an iteration that never began does not close what it would have iterated over
            self._release()
        except ValueError:  # the other thread is inside of it
            return

    @property
    def result(self) -> Generation:
        """What has been generated so far."""
        text = "" if self._tokenizer is None else decode_text(self._tokenizer, self.token_ids)
        return Generation(text, list(self.token_ids), self._prompt.tolist(), self.stats, self.stats.finish_reason)


def _pieces(
    tokens: Iterator[list[int]],
    said: list[int],
    prompt: Tensor,
    tokenizer: PreTrainedTokenizerBase | None,
    stats: DecodeStats,
    streamer: BaseStreamer | None,
) -> Iterator[str]:
    """The pieces of text of an answer; ``said`` grows by its tokens."""
    spell = Detokenizer(tokenizer) if tokenizer is not None else None
    try:
        if streamer is not None:
            streamer.put(prompt[None])
        for new in tokens:
            said.extend(new)
            for token in new if streamer is not None else ():
                streamer.put(torch.tensor([token], device="cpu"))
            if spell is not None and (piece := spell.push(new)):
                yield piece
        if spell is not None and (piece := spell.push([], last=True)):
            yield piece
    except (KeyboardInterrupt, GeneratorExit):
        stats.interrupted = stats.ending is None  # else all of it is there
        raise
    finally:
        tokens.close()
        if streamer is not None:
            streamer.end()
