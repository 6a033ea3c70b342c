"""Exact sampling: from logits to scores, the sources of chance, and the rule that accepts or resamples guesses."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
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
        """``vocabulary``: V, the target's number of logits. Without ``do_sample``, the best token is taken."""
        self.vocabulary = vocabulary
        self._processors = processors
        self.do_sample = do_sample
        self._rowwise = all(type(p) in _ROWWISE for p in processors)  # a subclass may do anything

    def scores(self, logits: Tensor, prefixes: Sequence[Callable[[torch.device], Tensor]]) -> Tensor:
        """Scores of T tokens, [T, V] float32: logarithms of what they are drawn with, up to a constant per row.

        Args:
            logits: [T, V'] of any level. A level with another number of padding tokens is cut or filled to V.
            prefixes: for each row, what puts the token ids (n,) that it follows on a device.
        """
        scores = self._fit(logits.to(torch.float32, copy=True))
        if not self._processors:
            return scores
        if self._rowwise:  # they do not look at the text, so it need not be brought to the device
            nothing = torch.empty(len(scores), 0, dtype=torch.long, device=scores.device)
            return self._processors(nothing, scores)
        pairs = zip(prefixes, scores.split(1), strict=True)
        return torch.cat([self._processors(prefix(scores.device)[None], row) for prefix, row in pairs])

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


def accept_one(p: Tensor, q: Tensor, tokens: Sequence[int], choices: Choices) -> int:
    """Accept one of several candidates, or draw another token, so that what comes out is distributed as ``p``.

    For a single candidate this is the rule of speculative sampling (arXiv 2211.17192, 2302.01318): token x is accepted
    with min(1, p(x)/q(x)); else the token is drawn from max(p - q, 0), normalised. With several, drawn from q one after
    the other without replacement, each rejection leaves the same question for what remains of p and q (SpecInfer, arXiv
    2305.09781; Sequoia, arXiv 2402.12374).

    Args:
        p: (V,), the judge's distribution.
        q: (V,), the distribution that the first candidate was really drawn from.
        tokens: the candidates, in the order of drawing.
        choices: the source of chance.
    """
    for token in tokens:
        if choices.accept(min(1.0, float(p[token] / q[token]))):
            return token
        p, q = residual(p, q), without(q, token)
    return choices.draw(p)


def without(q: Tensor, token: int) -> Tensor:
    """The distribution ``q`` (V,) given that it is not this token. Zeros, if it can only be this one."""
    rest = q.clone()
    rest[token] = 0.0
    mass = rest.sum()
    return torch.where(mass > 0, rest / mass, rest)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """Normalised max(p - q, 0), (V,): what is left of p once q has had its share."""
    rest = (p - q).clamp(min=0.0)
    mass = rest.sum()
    # p == q up to rounding: then a rejection has probability 0 up to rounding too, and p is the limit.
    return torch.where(mass > 0, rest / mass, p)
