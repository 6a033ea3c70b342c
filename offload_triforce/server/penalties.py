"""OpenAI's penalties and biases as logits processors. They go by ids and scores alone, so drafts call them too: for
each place of the tree with that place's own text before it."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor

from offload_triforce.speculation.processors import stateless


@stateless
class CountPenalty(LogitsProcessor):
    """Takes ``frequency`` from a token's score for each time that the answer has it, and ``presence`` once."""

    def __init__(self, prompt_tokens: int, presence: float, frequency: float) -> None:
        """``prompt_tokens``: where the answer begins; what stands before does not count."""
        self._start, self._presence, self._frequency = prompt_tokens, presence, frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Ids [1, n] and scores [1, V] -> scores [1, V]."""
        answer = input_ids[:, self._start :]
        counts = torch.zeros_like(scores).scatter_add_(1, answer, torch.ones_like(answer, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0)


@stateless
class LogitBias(LogitsProcessor):
    """Adds to the scores of some tokens."""

    def __init__(self, bias: dict[int, float]) -> None:
        """``bias``: by token id."""
        self._tokens, self._bias = torch.tensor(list(bias)), torch.tensor(list(bias.values()))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Ids [1, n] and scores [1, V] -> scores [1, V]."""
        bias = self._bias.to(scores.device, scores.dtype)[None]
        return scores.index_add(1, self._tokens.to(scores.device), bias)
