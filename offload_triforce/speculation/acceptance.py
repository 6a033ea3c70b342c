"""Acceptance: how draft tokens are made and judged, so that the judge's own distribution comes out. Two exact rules.

``Coupled``: every place of the text has its own noise, and every level takes the token with the largest score plus
noise there: an exact draw from its distribution (the Gumbel-max trick). Levels that nearly agree then nearly always
take the same token, and which candidates a tree offers has no bearing on what comes out: the answer is the one that
plain decoding gives with the same seed, token for token. Greedy decoding is the case without noise.

``Resampled``: candidates are drawn without replacement, and accepted or resampled one after the other, the rule of
TriForce. A chain of single draft tokens is accepted a little more often than by coupling, a tree less often.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from offload_triforce.speculation.noise import Noise
from offload_triforce.speculation.place import Place
from offload_triforce.speculation.sampling import Choices, Sampler, Survey, accept_one, without
from offload_triforce.speculation.text import TokenText
from offload_triforce.speculation.tree import Candidates, Node, prefix_of


def place_after(text: TokenText, node: Node) -> Place:
    """The place of what follows a node of a tree at the end of the text."""
    return Place(partial(prefix_of, text, node), len(text) + node.depth, node.state)


class DraftToken(NamedTuple):
    """A token that a drafter proposes. ``q`` (V,): the distribution it was drawn from; None where it was not drawn."""

    token: int
    q: Tensor | None


class AcceptanceRule(Protocol):
    """The acceptance rule: how draft tokens are made and judged.

    ``prior``: first estimates of how often a candidate is taken, by rank and kind.
    """

    prior: Sequence[Sequence[float]]

    def draft(self, logits: Tensor, place: Place) -> DraftToken | None:
        """A draft model's draft token, from its logits [1, V']; None if there can be none."""

    def candidates(
        self, logits: Tensor, places: Sequence[Place], drafted: Sequence[DraftToken | None]
    ) -> Sequence[Candidates]:
        """The retrieval level's candidates for each of T places, from its logits [T, V'].

        ``drafted``: the drafter's token for each place, if there is one, which may become the first candidate.
        """

    def survey(self, logits: Tensor, nodes: Sequence[Node], text: TokenText) -> Survey:
        """What ``verdict`` can go by at the T nodes of a tree behind the text, from their logits [T, V']: the host
        waits once. No chance comes in, and of the logits processors none that a text could be told by.
        """

    def verdict(
        self,
        logits: Tensor,
        place: Place,
        candidates: Candidates | None,
        offered: int,
        told: Sequence[float] | None = None,
    ) -> int:
        """The target's token for a place, from its logits [1, V'], given the first ``offered`` candidates.

        Whether one more is offered must have been decided before it was drawn. To be asked once for each place of the
        text, in order: logits processors may count on it. ``told``: by ``survey``, of this node.

        Raises:
            InputError, UnsupportedModelError: see ``Sampler.check``. Errors of the logits processors are passed on.
        """


# A candidate's kind is its gap behind the best score, in steps of this many nats; for the best one, its lead.
GAP = 0.25
KINDS = 16
MOST_CANDIDATES = 4

# What is expected before anything has been seen: curves through what `python -m benchmarks.retrieval` found on
# SmolLM2 with 192 of 6,000 tokens, at temperatures of 0.6 and 1.
_MIDDLES = [GAP * (kind + 0.5) for kind in range(KINDS)]
COUPLING_PRIOR = (
    tuple(1 - 0.6 * math.exp(-1.75 * lead) for lead in _MIDDLES),
    tuple(0.37 * math.exp(-1.7 * gap) for gap in _MIDDLES),
    tuple(0.16 * math.exp(-1.4 * gap) for gap in _MIDDLES),
    tuple(0.12 * math.exp(-1.6 * gap) for gap in _MIDDLES),
)
RESAMPLING_PRIOR = tuple((share,) * KINDS for share in (0.9, 0.04, 0.02, 0.01))


class Ranking:
    """Candidates in the order of their scores."""

    def __init__(self, scores: Sequence[float], tokens: Sequence[int]) -> None:
        """Both best first; what has a score of -inf is no candidate, and no number is NaN."""
        self.tokens = [t for s, t in zip(scores, tokens, strict=True) if s > float("-inf")]
        second = scores[1] if len(scores) > 1 else float("-inf")
        gaps = [scores[0] - second, *[scores[0] - score for score in scores[1:]]]
        self._gaps = gaps[: len(self.tokens)]

    def token(self, rank: int) -> int | None:
        """The candidate of that rank; None if there is none."""
        return self.tokens[rank] if rank < len(self.tokens) else None

    def kind(self, rank: int) -> int:
        """By the gap; for the first, by its lead."""
        return int(min(self._gaps[rank] / GAP, KINDS - 1)) if rank < len(self._gaps) else KINDS - 1


class Coupled:
    """Coupled acceptance: a level's token at a place is the one with the largest score plus noise."""

    prior = COUPLING_PRIOR

    def __init__(self, sampler: Sampler, noise: Noise | None) -> None:
        """``noise``: None decodes greedily."""
        self._sampler, self._noise = sampler, noise

    def _race(self, scores: Tensor, places: Sequence[Place]) -> Tensor:
        if self._noise is None:
            return scores
        return scores + torch.stack([self._noise.at(place.position) for place in places])

    def _tell(self, scores: Tensor, places: Sequence[Place]) -> Tensor:
        """The best score at each of T places, and the token that is taken there: float64 [T, 2]."""
        return torch.stack([scores.amax(dim=1).double(), self._race(scores, places).argmax(dim=1).double()], dim=1)

    def _rank(self, scores: Tensor, places: Sequence[Place]) -> Tensor:
        """The best of the race at each of T places, best first: so many scores, then as many tokens, float64."""
        race = self._race(scores, places)
        best, tokens = race.topk(min(MOST_CANDIDATES, race.shape[1]), dim=1)
        return torch.cat([best.double(), tokens], dim=1)

    def draft(self, logits: Tensor, place: Place) -> DraftToken | None:
        """See ``AcceptanceRule``."""

        def tell(scores: Tensor, numbers: Sequence[int]) -> Tensor:
            best, token = self._race(scores, [place]).max(dim=1)
            return torch.stack([best.double(), token.double()], dim=1)

        ((best, token),) = self._sampler.tell_drafts(logits, [place], tell)
        return DraftToken(int(token), None) if best > -math.inf else None

    def candidates(
        self, logits: Tensor, places: Sequence[Place], drafted: Sequence[DraftToken | None]
    ) -> Sequence[Candidates]:
        """See ``AcceptanceRule``. The drafter's tokens have no say."""
        rows = self._sampler.tell_drafts(
            logits, places, lambda scores, numbers: self._rank(scores, [places[number] for number in numbers])
        )
        ranks = min(MOST_CANDIDATES, self._sampler.vocabulary)
        return [Ranking(row[:ranks], [int(token) for token in row[ranks:]]) for row in rows]

    def survey(self, logits: Tensor, nodes: Sequence[Node], text: TokenText) -> Survey:
        """See ``AcceptanceRule``."""
        if self._noise is not None:
            self._noise.forget(len(text))
        places = [place_after(text, node) for node in nodes]
        return self._sampler.survey(
            logits, lambda scores, numbers: self._tell(scores, [places[number] for number in numbers])
        )

    def verdict(
        self,
        logits: Tensor,
        place: Place,
        candidates: Candidates | None,
        offered: int,
        told: Sequence[float] | None = None,
    ) -> int:
        """See ``AcceptanceRule``. What was offered makes no difference."""
        if self._noise is not None:
            self._noise.forget(place.position)
        if told is None:
            (told,) = self._tell(self._sampler.target_scores(logits, place), [place]).tolist()
        best, token = told
        self._sampler.check(best, logits, place)
        return int(token)


class Drawn:
    """Candidates drawn one after the other without replacement, when they are asked for."""

    def __init__(
        self, q: Tensor, draft_token: DraftToken | None, choices: Choices, likeliest: float, support: int
    ) -> None:
        """``q``: (V,). ``draft_token``: the drafter's; it is accepted as the first candidate, or resampled.

        ``likeliest``: the highest of its probabilities. ``support``: how many are not zero.
        """
        self.q = q
        self.tokens: list[int] = []
        self._rest, self._draft_token, self._choices, self._support = q, draft_token, choices, support
        self._kind = int(min(likeliest * KINDS, KINDS - 1))

    def token(self, rank: int) -> int | None:
        """The candidate of that rank; None if there is none."""
        while len(self.tokens) <= rank:
            if len(self.tokens) >= self._support:
                return None
            if self._draft_token is not None and not self.tokens:
                of_draft = (
                    self._draft_token.q
                    if self._draft_token.q is not None
                    else _certain(self._draft_token.token, self.q)
                )
                token = accept_one(self.q, of_draft, [self._draft_token.token], self._choices)
            else:
                token = self._choices.draw(self._rest)
            self.tokens.append(token)
            self._rest = without(self._rest, token)
        return self.tokens[rank]

    def kind(self, rank: int) -> int:
        """By the probability of the likeliest token: of the candidates nothing may be known before they are drawn."""
        return self._kind


class Resampled:
    """Resampled acceptance: candidates are drawn, and accepted or resampled."""

    prior = RESAMPLING_PRIOR

    def __init__(self, sampler: Sampler, choices: Choices) -> None:
        self._sampler, self._choices = sampler, choices

    def _rows(self, logits: Tensor, places: Sequence[Place]) -> list[tuple[Tensor, float, int]]:
        """What drafts are drawn from at T places: q (V,), zeros where there can be none; its maximum, and support."""
        rows: list[Tensor] = [logits] * len(places)

        def tell(scores: Tensor, numbers: Sequence[int]) -> Tensor:
            found = torch.softmax(scores, dim=-1).nan_to_num(0.0)
            for number, q in zip(numbers, found, strict=True):
                rows[number] = q
            return torch.stack([found.amax(dim=1).double(), (found > 0).sum(dim=1).double()], dim=1)

        told = self._sampler.tell_drafts(logits, places, tell)
        return [(q, row[0], int(row[1])) for q, row in zip(rows, told, strict=True)]

    def draft(self, logits: Tensor, place: Place) -> DraftToken | None:
        """See ``AcceptanceRule``."""
        ((q, _, support),) = self._rows(logits, [place])
        return DraftToken(self._choices.draw(q), q) if support else None

    def candidates(
        self, logits: Tensor, places: Sequence[Place], drafted: Sequence[DraftToken | None]
    ) -> Sequence[Candidates]:
        """See ``AcceptanceRule``."""
        rows = self._rows(logits, places)
        return [
            Drawn(q, draft_token, self._choices, likeliest, support)
            for (q, likeliest, support), draft_token in zip(rows, drafted, strict=True)
        ]

    def survey(self, logits: Tensor, nodes: Sequence[Node], text: TokenText) -> Survey:
        """See ``AcceptanceRule``. Of each node's first candidate it says p / q."""
        first = [_first(node.candidates, len(node.children)) for node in nodes]
        return self._sampler.survey(
            logits, lambda scores, numbers: _tell(scores, [first[number] for number in numbers])
        )

    def verdict(
        self,
        logits: Tensor,
        place: Place,
        candidates: Candidates | None,
        offered: int,
        told: Sequence[float] | None = None,
    ) -> int:
        """See ``AcceptanceRule``."""
        p: Tensor | Callable[[], Tensor]
        if told is None:
            scores = self._sampler.target_scores(logits, place)
            (told,), p = _tell(scores, [_first(candidates, offered)]).tolist(), torch.softmax(scores, dim=-1)[0]
        else:  # by processors that may be asked twice; and often they need not be

            def p() -> Tensor:
                return torch.softmax(self._sampler.target_scores(logits, place), dim=-1)[0]

        best, ratio = told
        self._sampler.check(best, logits, place)
        if candidates is None:
            return accept_one(p, logits, [], self._choices)
        return accept_one(p, candidates.q, candidates.tokens[:offered], self._choices, ratio)


def _first(candidates: Candidates | None, offered: int) -> tuple[int, Tensor] | None:
    """The first candidate, if there is one, and what it was drawn from."""
    return (candidates.tokens[0], candidates.q) if candidates is not None and offered else None


def _tell(scores: Tensor, first: Sequence[tuple[int, Tensor] | None]) -> Tensor:
    """The best of the target's scores at each of T places, and p / q of the first candidate there: float64 [T, 2]."""
    best, p = scores.amax(dim=1), torch.softmax(scores, dim=-1)
    nothing = best.new_zeros(())
    ratios = [nothing if of is None else p[row, of[0]] / of[1][of[0]] for row, of in enumerate(first)]
    return torch.stack([best.double(), torch.stack(ratios).double()], dim=1)


def _certain(token: int, like: Tensor) -> Tensor:
    row = torch.zeros_like(like)
    row[token] = 1.0
    return row
