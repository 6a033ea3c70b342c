"""Exact sampling: from logits to distributions, and the rule that accepts or resamples a guess."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process

# Processors that look at one row of scores and at nothing else. All others also get the row's own prefix.
_ROWWISE = tuple(
    getattr(logits_process, name)
    for name in (
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
    )
)


class Sampler:
    """Turns logits into the distributions that tokens are drawn from: the same rule for every level."""

    def __init__(self, processors: LogitsProcessorList, do_sample: bool, vocabulary: int) -> None:
        """``vocabulary``: V, the target's number of logits. Without ``do_sample``, all mass is on the best token."""
        self.vocabulary = vocabulary
        self._processors = processors
        self._do_sample = do_sample
        self._rowwise = all(type(p) in _ROWWISE for p in processors)  # a subclass may do anything

    def distributions(self, logits: Tensor, prefix: Tensor, first: int) -> Tensor:
        """Distributions of T consecutive tokens, [T, V] float32.

        Args:
            logits: [T, V'] of any level. A level with another number of padding tokens is cut or filled to V.
            prefix: token ids (n,), n >= first + T - 1.
            first: row i follows the first ``first + i`` of them.
        """
        scores = self._fit(logits.to(torch.float32, copy=True))
        if self._processors:
            if self._rowwise:  # they do not look at the text, so it need not be brought to the device
                nothing = torch.empty(len(scores), 0, dtype=torch.long, device=scores.device)
                scores = self._processors(nothing, scores)
            else:
                prefix = prefix.to(scores.device)[None]
                rows = [self._processors(prefix[:, : first + i], scores[i : i + 1]) for i in range(len(scores))]
                scores = torch.cat(rows)
        if self._do_sample:
            return torch.softmax(scores, dim=-1)
        return torch.zeros_like(scores).scatter_(1, scores.argmax(dim=-1, keepdim=True), 1.0)

    def _fit(self, scores: Tensor) -> Tensor:
        missing = self.vocabulary - scores.shape[1]
        if missing <= 0:
            return scores[:, : self.vocabulary]
        return torch.nn.functional.pad(scores, (0, missing), value=float("-inf"))


class Choices(Protocol):
    """Where chance comes in. Exchanging it lets a test walk through every outcome."""

    def accept(self, probability: float) -> bool:
        """True with the given probability."""

    def draw(self, distribution: Tensor) -> int:
        """A token from a distribution (V,)."""


class RandomChoices:
    """Choices from seeded generators."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._coin = random.Random(seed)
        # torch's CPU generator takes 32 bits of a seed; let all bits of ours count.
        self._generator = torch.Generator(device).manual_seed(self._coin.getrandbits(32))

    def accept(self, probability: float) -> bool:
        """True with the given probability."""
        return self._coin.random() < probability

    def draw(self, distribution: Tensor) -> int:
        """A token from a distribution (V,)."""
        return int(torch.multinomial(distribution, 1, generator=self._generator))


def verify(guesses: Sequence[int], q: Tensor, p: Tensor, choices: Choices) -> tuple[int, int]:
    """Accept a prefix of the guesses and draw one more token, so that what comes out is distributed as ``p``.

    The rule of speculative sampling (arXiv 2211.17192, 2302.01318): guess x is accepted with min(1, p(x)/q(x));
    at the first rejection the token is drawn from max(p - q, 0), normalised; after the last guess, from p.

    Args:
        guesses: k tokens.
        q: [k, V], the distribution each guess was really drawn from.
        p: [k + 1, V], the judge's distribution at each guess and after the last.
        choices: the source of chance.

    Returns:
        (number of accepted guesses, the token that follows them).
    """
    if not guesses:
        return 0, choices.draw(p[-1])
    rows = torch.arange(len(guesses), device=p.device)
    tokens = torch.as_tensor(guesses, dtype=torch.long, device=p.device)
    odds = (p[rows, tokens] / q[rows, tokens]).clamp(max=1.0)
    for i, probability in enumerate(odds.tolist()):
        if not choices.accept(probability):
            return i, choices.draw(residual(p[i], q[i]))
    return len(guesses), choices.draw(p[-1])


def residual(p: Tensor, q: Tensor) -> Tensor:
    """Normalised max(p - q, 0), (V,): what is left of p once q has had its share."""
    rest = (p - q).clamp(min=0.0)
    mass = rest.sum()
    # p == q up to rounding: then a rejection has probability 0 up to rounding too, and p is the limit.
    return torch.where(mass > 0, rest / mass, p)
