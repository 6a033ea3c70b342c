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
import random
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from offload_triforce.speculation.place import Place
from offload_triforce.speculation.sampling import Choices, Sampler, accept_one, without
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

    def verdict(self, logits: Tensor, place: Place, candidates: Candidates | None, offered: int) -> int:
        """The target's token for a place, from its logits [1, V'], given the first ``offered`` candidates.

        Whether one more is offered must have been decided before it was drawn. To be asked once for each place of the
        text, in order: logits processors may count on it.

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


class Noise:
    """Independent standard Gumbel noise (V,) for each position of a text, from a seed."""

    def __init__(self, seed: int, first: int, vocabulary: int, device: torch.device) -> None:
        """``first``: the position that decoding begins at."""
        # torch's CPU generator takes 32 bits of a seed; let all bits of ours count.
        self._generator = torch.Generator(device).manual_seed(random.Random(seed).getrandbits(32))
        self._first, self._vocabulary, self._device = first, vocabulary, device
        self._rows: deque[Tensor] = deque()

    def at(self, position: int) -> Tensor:
        """The noise of a position, which must not have been forgotten."""
        if position < self._first:
            raise IndexError(f"the noise of position {position} has been forgotten")
        while len(self._rows) <= position - self._first:  # in order, so that it does not matter who asks when
            row = torch.empty(self._vocabulary, device=self._device)
            self._rows.append(row.exponential_(generator=self._generator).log_().neg_())
        return self._rows[position - self._first]

    def forget(self, position: int) -> None:
        """What comes before ``position`` will not be asked for again."""
        while self._first < position:
            self.at(self._first)  # what was never asked for is drawn all the same
            self._rows.popleft()
            self._first += 1


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

    def draft(self, logits: Tensor, place: Place) -> DraftToken | None:
        """See ``AcceptanceRule``."""
        best, token = self._race(self._sampler.draft_scores(logits, [place]), [place]).max(dim=1)
        return DraftToken(int(token), None) if float(best) > -math.inf else None

    def candidates(
        self, logits: Tensor, places: Sequence[Place], drafted: Sequence[DraftToken | None]
    ) -> Sequence[Candidates]:
        """See ``AcceptanceRule``. The drafter's tokens have no say."""
        race = self._race(self._sampler.draft_scores(logits, places), places)
        scores, tokens = race.topk(min(MOST_CANDIDATES, race.shape[1]), dim=1)
        return [Ranking(*row) for row in zip(scores.tolist(), tokens.tolist(), strict=True)]

    def verdict(self, logits: Tensor, place: Place, candidates: Candidates | None, offered: int) -> int:
        """See ``AcceptanceRule``. What was offered makes no difference."""
        if self._noise is not None:
            self._noise.forget(place.position)
        scores = self._sampler.target_scores(logits, place)
        self._sampler.check(float(scores.max()), logits, place)
        return int(self._race(scores, [place]).argmax())


class Drawn:
    """Candidates drawn one after the other without replacement, when they are asked for."""

    def __init__(self, q: Tensor, draft_token: DraftToken | None, choices: Choices) -> None:
        """``q``: (V,). ``draft_token``: the drafter's; it is accepted as the first candidate, or resampled."""
        self.q = q
        self.tokens: list[int] = []
        self._rest, self._draft_token, self._choices = q, draft_token, choices
        self._kind = int(min(float(q.max()) * KINDS, KINDS - 1))

    def token(self, rank: int) -> int | None:
        """The candidate of that rank; None if there is none."""
        while len(self.tokens) <= rank:
            if not bool(self._rest.sum() > 0):
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

    def _rows(self, logits: Tensor, places: Sequence[Place]) -> Tensor:
        """What drafts are drawn from at T places, [T, V]; zeros where there can be none."""
        return torch.softmax(self._sampler.draft_scores(logits, places), dim=-1).nan_to_num(0.0)

    def draft(self, logits: Tensor, place: Place) -> DraftToken | None:
        """See ``AcceptanceRule``."""
        q = self._rows(logits, [place])[0]
        return DraftToken(self._choices.draw(q), q) if bool(q.sum() > 0) else None

    def candidates(
        self, logits: Tensor, places: Sequence[Place], drafted: Sequence[DraftToken | None]
    ) -> Sequence[Candidates]:
        """See ``AcceptanceRule``."""
        rows = self._rows(logits, places)
        return [Drawn(row, draft_token, self._choices) for row, draft_token in zip(rows, drafted, strict=True)]

    def verdict(self, logits: Tensor, place: Place, candidates: Candidates | None, offered: int) -> int:
        """See ``AcceptanceRule``."""
        scores = self._sampler.target_scores(logits, place)
        self._sampler.check(float(scores.max()), logits, place)
        p = torch.softmax(scores, dim=-1)[0]
        if candidates is None:
            return self._choices.draw(p)
        return accept_one(p, candidates.q, candidates.tokens[:offered], self._choices)


def _certain(token: int, like: Tensor) -> Tensor:
    row = torch.zeros_like(like)
    row[token] = 1.0
    return row
