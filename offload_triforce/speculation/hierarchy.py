"""The algorithm: each level judges the guesses of the one below it. One page; everything else serves it.

    draft (L0)  ->  retrieval level (L1)  ->  target with the full cache (L2)

``judge`` is one round between two neighbours. The tokens it adds have the judge's own distribution, whoever
guessed; so the middle level's output can be guesses for the target, with the middle level's distributions as
their q. That both levels are exact is one and the same rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from offload_triforce.speculation.sampling import Choices, verify
from offload_triforce.speculation.text import TokenText
from offload_triforce.stats import Acceptance, DecodeStats


class Proposer(Protocol):
    """Something that guesses how the text goes on."""

    def propose(self, text: TokenText, limit: int) -> Tensor:
        """Append k <= ``limit`` guesses; return the distributions they were drawn from, [k, V]."""

    def keep(self, length: int) -> None:
        """Forget everything after the first ``length`` tokens of the text."""


class Level(Protocol):
    """A model with a cache."""

    def score(self, text: TokenText, guesses: int) -> Tensor:
        """Read the text's unread end; its distributions before each of the last ``guesses`` tokens and after them."""

    def keep(self, length: int) -> None:
        """Forget everything after the first ``length`` tokens of the text."""


class Target(Level, Protocol):
    """The level that has the last word."""

    def settle(self) -> None:
        """What is held now is final."""


def judge(level: Level, below: Proposer, text: TokenText, guesses: int, choices: Choices, count: Acceptance) -> Tensor:
    """One round: ``below`` guesses up to ``guesses`` tokens, ``level`` verifies them all at once and adds one.

    Returns the level's distributions [m, V] of the m = accepted + 1 tokens that the text has grown by.
    """
    start = len(text)
    q = below.propose(text, guesses)
    p = level.score(text, len(text) - start)
    accepted, token = verify(text[start:], q, p, choices)
    count.add(proposed=len(text) - start, accepted=accepted)
    text.truncate(start + accepted)
    level.keep(len(text))
    below.keep(len(text))
    text.append([token])
    return p[: accepted + 1]


class Middle:
    """The level between: proposes tokens of its own distribution, found with the help of the level below."""

    def __init__(
        self,
        level: Level,
        below: Proposer,
        gamma: int,
        choices: Choices,
        count: Acceptance,
        ended: Callable[[TokenText], bool],
    ) -> None:
        """``gamma``: guesses per round of the level below. ``ended``: is there nothing to say after this token?"""
        self.level, self.below, self.gamma = level, below, gamma
        self.choices, self.count, self.ended = choices, count, ended

    def propose(self, text: TokenText, limit: int) -> Tensor:
        """Append guesses until there are ``limit``, or the text has ended; return their distributions."""
        end = len(text) + limit
        rows: list[Tensor] = []
        while len(text) < end and not (rows and self.ended(text)):
            guesses = min(self.gamma, end - len(text) - 1)
            rows.append(judge(self.level, self.below, text, guesses, self.choices, self.count))
        return torch.cat(rows) if rows else torch.empty(0)

    def keep(self, length: int) -> None:
        """Forget everything after the first ``length`` tokens of the text."""
        self.level.keep(length)
        self.below.keep(length)


def decode(
    target: Target,
    middle: Proposer,
    text: TokenText,
    gamma: int,
    limit: int,
    choices: Choices,
    stats: DecodeStats,
    stop: Callable[[TokenText, int], int | None],
) -> Iterator[list[int]]:
    """Decode up to ``limit`` tokens; yields the new ones after each pass of the target.

    Args:
        target: the authority. middle: whoever guesses for it.
        text: prompt in, everything out.
        gamma: guesses per pass.
        limit: most new tokens.
        choices: the source of chance. stats: what is counted.
        stop: (text, length before the pass) -> length to cut the text to, or None to go on.
    """
    end = len(text) + limit
    while len(text) < end:
        start = len(text)
        judge(target, middle, text, min(gamma, end - start - 1), choices, stats.retrieval)
        target.settle()
        text.decide()
        cut = stop(text, start)
        if cut is not None:
            text.truncate(cut)
        stats.passes += 1
        stats.new_tokens += len(text) - start
        yield text[start:]
        if cut is not None:
            return
