"""An answer, finished or still coming."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from offload_triforce.detokenize import Detokenizer
from offload_triforce.stats import DecodeStats


@dataclass(frozen=True)
class Generation:
    """A finished (or interrupted) answer. ``text`` is empty when there is no tokenizer."""

    text: str
    token_ids: list[int]
    prompt_ids: list[int]
    stats: DecodeStats

    @property
    def sequences(self) -> Tensor:
        """Prompt and answer as transformers returns them, [1, n]."""
        return torch.tensor([self.prompt_ids + self.token_ids], device="cpu")


class TextStream:
    """An answer while it comes: iterate for the pieces of text, then (or at any time) look at ``result``."""

    def __init__(
        self,
        tokens: Iterator[list[int]],
        prompt: Tensor,
        tokenizer: PreTrainedTokenizerBase | None,
        stats: DecodeStats,
        streamer: BaseStreamer | None,
    ) -> None:
        """``tokens``: what each pass yields. ``prompt``: (n,) ids. ``stats``: filled in as the tokens come."""
        self.stats = stats
        self.token_ids: list[int] = []
        self._tokens, self._prompt, self._tokenizer = tokens, prompt, tokenizer
        self._pieces = self._run(streamer)

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def result(self) -> Generation:
        """What has been generated so far."""
        text = ""
        if self._tokenizer is not None:
            text = self._tokenizer.decode(self.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Generation(text, list(self.token_ids), self._prompt.tolist(), self.stats)

    def _run(self, streamer: BaseStreamer | None) -> Iterator[str]:
        spell = Detokenizer(self._tokenizer) if self._tokenizer is not None else None
        try:
            if streamer is not None:
                streamer.put(self._prompt[None])
            for tokens in self._tokens:
                self.token_ids.extend(tokens)
                for token in tokens if streamer is not None else ():
                    streamer.put(torch.tensor([token], device="cpu"))
                if spell is not None and (piece := spell.push(tokens)):
                    yield piece
            if spell is not None and (piece := spell.push([], last=True)):
                yield piece
        except (KeyboardInterrupt, GeneratorExit):
            self.stats.interrupted = True
            raise
        finally:
            self._tokens.close()
            if streamer is not None:
                streamer.end()
