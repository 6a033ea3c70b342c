"""Exact sampling: from logits to scores, the sources of chance, and the rule that accepts or resamples draft tokens."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import TopPLogitsWarper

from offload_triforce.errors import InputError, UnsupportedModelError
from offload_triforce.speculation.place import PathState, Place
from offload_triforce.speculation.processors import Kind, Processor, fork_of, kind_of
from offload_triforce.speculation.top_p import QuickTopP

# Of scores [t, V] of the rows with these t numbers, what somebody wants to know of them: float64 [t, n].
Tell = Callable[[Tensor, Sequence[int]], Tensor]

# A pass is looked at so many rows at a time: their scores take memory, a few times over.
SLICE = 16


class Survey(NamedTuple):
    """What the host is told of all rows of a pass at once.

    Attributes:
        sound: whether all logits are numbers.
        rows: what ``Tell`` says of each; None where the processors have to be asked place by place.
    """

    sound: bool
    rows: Sequence[Sequence[float] | None]


class Sampler:
    """Turns logits into scores, what tokens are drawn by.

    The target's are those of transformers: every processor is called, once per token, and its errors are the user's.
    Drafts are scored by the same processors as far as these may be asked out of turn (see ``processors``), and a place
    that a processor rejects has no candidates: it raises, it leaves no token, or no number.
    """

    def __init__(
        self, processors: LogitsProcessorList, do_sample: bool, vocabulary: int, readable: int | None = None
    ) -> None:
        """Without ``do_sample``, the best token is taken.

        ``vocabulary``: V, the target's number of logits. ``readable``: of them, the ids that it can read again; None is
        all. Others are no draft tokens.
        """
        self.vocabulary, self.do_sample = vocabulary, do_sample
        self._readable = vocabulary if readable is None else min(vocabulary, readable)
        kinds = [kind_of(processor) for processor in processors]
        self._processors = LogitsProcessorList(processors)
        self._of_drafts = LogitsProcessorList(
            processor for processor, kind in zip(processors, kinds, strict=True) if kind is not Kind.UNKNOWN
        )
        self._forks = Kind.FORKS in kinds
        self._rowwise = all(kind is Kind.ROW for kind in kinds)
        self._rowwise_drafts = all(kind_of(processor) is Kind.ROW for processor in self._of_drafts)
        self._quick = [_quick(processor) for processor, kind in zip(processors, kinds, strict=True) if kind is Kind.ROW]

    def target_scores(self, logits: Tensor, place: Place) -> Tensor:
        """The target's scores of the tokens at a place, [1, V] float32: logarithms of what they are drawn with.

        To be called once for each place of the text, in order.

        Args:
            logits: [1, V'].
            place: what does not look at the text does not have it brought to the device.

        Raises:
            UnsupportedModelError: the logits are not numbers, and a processor stumbled over that.
        """
        scores = self._fit(logits)
        if not self._processors:
            return scores
        ids = _nothing(scores) if self._rowwise else place.prefix(scores.device)[None]
        try:
            return self._processors(ids, scores)
        except Exception:
            _refuse_nan(logits, place)
            raise

    def draft_scores(self, logits: Tensor, places: Sequence[Place]) -> Tensor:
        """Scores of T tokens for drafts, [T, V] float32; a row is all -inf where nothing can be drafted.

        ``logits``: [T, V'] of any level. A level with another number of padding tokens is cut or filled to V.
        """
        scores = self._fit(logits)
        return self._draftable(self._processed(scores, places) if self._of_drafts else scores)

    def tell_drafts(self, logits: Tensor, places: Sequence[Place], tell: Tell) -> Sequence[Sequence[float]]:
        """What is to be known of ``draft_scores``, for each of the T places; the host waits once.

        Where a shortcut may have led elsewhere, ``tell`` is asked about a row again: then the second time counts.
        """
        everything = range(len(places))
        try:
            scores, certain = self._quickly(logits) if self._rowwise_drafts else (None, None)
        except Exception:  # one row was reason enough: which one, is found out there
            scores = certain = None
        if certain is None:
            scores = self.draft_scores(logits, places) if scores is None else self._draftable(scores)
            return tell(scores, everything).tolist()
        told = tell(self._draftable(scores), everything)
        rows = torch.cat([told, certain[:, None]], dim=1).tolist()
        if unsure := [number for number, row in enumerate(rows) if not row[-1]]:
            parts = torch.cat([logits[number : number + 1] for number in unsure])
            again = tell(self.draft_scores(parts, [places[number] for number in unsure]), unsure).tolist()
            for number, row in zip(unsure, again, strict=True):
                rows[number] = [*row, 1.0]
        return [row[:-1] for row in rows]

    def survey(self, logits: Tensor, tell: Tell) -> Survey:
        """What is to be known of ``target_scores`` for all rows of a pass, logits [T, V']; the host waits once.

        The processors are only called where nobody could tell: where each row's scores follow from its logits alone.
        """
        sound, parts = ~logits.isnan().any(), []
        if self._rowwise:
            try:
                for start in range(0, len(logits), SLICE):
                    parts.append(self._told(logits[start : start + SLICE], start, tell))
            except Exception:  # the text may never come to the row that it is about; there, it is raised again
                parts = []
        *flat, sound = torch.cat([*(part.flatten() for part in parts), sound.double()[None]]).tolist()
        if not parts:
            return Survey(bool(sound), [None] * len(logits))
        width = len(flat) // len(logits)
        rows = [flat[start : start + width] for start in range(0, len(flat), width)]
        return Survey(bool(sound), [row[:-1] if row[-1] else None for row in rows])

    def _told(self, logits: Tensor, start: int, tell: Tell) -> Tensor:
        """Of some rows: what is told, and whether it is certain, float64 [t, n + 1]."""
        scores, certain = self._quickly(logits)
        told = tell(scores, range(start, start + len(logits)))
        certain = told.new_ones(len(told)) if certain is None else certain
        return torch.cat([told, certain[:, None]], dim=1)

    def _quickly(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores by the processors that look at nothing but their row, and which rows are certain; None is all."""
        scores, certain = self._fit(logits), None
        nothing = _nothing(scores)
        for processor in self._quick:
            if isinstance(processor, QuickTopP):
                scores, clear = processor(scores)
                certain = clear if certain is None else certain & clear
            else:
                scores = processor(nothing, scores)
        return scores, certain

    def _draftable(self, scores: Tensor) -> Tensor:
        """Without what is no token, or no number."""
        if self._readable < self.vocabulary:
            scores = self._fit(scores[:, : self._readable])
        no_number = scores.isnan().any(dim=1, keepdim=True)
        return scores.masked_fill(no_number, -math.inf).clamp(max=torch.finfo(scores.dtype).max)

    def check(self, best: float, logits: Tensor, place: Place) -> None:
        """Refuse to go on where transformers would fail, or take a token for no reason.

        With all tokens ruled out, greedy decoding takes token 0 there, and here.

        Args:
            best: the highest of the target's scores. logits: [1, V'] that they come from. place: of the token.

        Raises:
            UnsupportedModelError: the model's logits are not numbers.
            InputError: the processors' scores are not numbers; or nothing, or something infinite, is to be drawn.
        """
        if math.isfinite(best) or not (self.do_sample or math.isnan(best)):
            return
        _refuse_nan(logits, place)
        after = f"after the first {place.position:,} tokens"
        if math.isnan(best):
            raise InputError(f"the logits processors leave scores {after} that are not numbers (NaN)")
        if best > 0:
            raise InputError(f"a score {after} is infinite, so that nothing can be drawn; let it be finite")
        raise InputError(f"the logits processors rule out every token {after}; let them leave at least one to draw")

    def _processed(self, scores: Tensor, places: Sequence[Place]) -> Tensor:
        if self._rowwise_drafts:
            try:
                return self._of_drafts(_nothing(scores), scores)
            except Exception:  # one row was reason enough: which one, shows below
                pass
        rows = zip(scores.split(1), places, strict=True)
        return torch.cat([self._processed_row(row, place) for row, place in rows])

    def _processed_row(self, row: Tensor, place: Place) -> Tensor:
        """One row [1, V]; all -inf where a processor rejects the path, or has rejected what came before."""
        rejected = torch.full_like(row, -math.inf)
        try:
            processors = self._processors_at(place.state)
            ids = _nothing(row) if self._rowwise_drafts else place.prefix(row.device)[None]
            scores = processors(ids, row)
        except Exception:  # whatever it was: should the text come here, the target's own call will raise it
            return rejected
        if place.state is not None:
            place.state.processors = processors
        return scores if scores.shape == row.shape else rejected

    def _processors_at(self, state: PathState | None) -> LogitsProcessorList:
        """What a draft calls at a place: of those that fork, a copy of what stands at the place before."""
        if not self._forks:
            return self._of_drafts
        if state is None:
            return LogitsProcessorList(p for p in self._of_drafts if kind_of(p) is not Kind.FORKS)
        before = self._of_drafts if state.before is None else state.before.processors
        if before is None:
            raise ValueError("the place before has been rejected")
        return LogitsProcessorList(fork_of(p) if kind_of(p) is Kind.FORKS else p for p in before)

    def _fit(self, logits: Tensor) -> Tensor:
        """A copy that processors may write to, [T, V] float32."""
        scores = logits.to(torch.float32, copy=True)
        missing = self.vocabulary - scores.shape[1]
        if missing <= 0:
            return scores[:, : self.vocabulary]
        return torch.nn.functional.pad(scores, (0, missing), value=-math.inf)


def _quick(processor: Processor) -> Processor | QuickTopP:
    """A processor of kind ``ROW``, or what does the same sooner."""
    return QuickTopP(processor) if type(processor) is TopPLogitsWarper else processor


def _nothing(scores: Tensor) -> Tensor:
    """Ids [T, 0] for processors that do not look at them."""
    return torch.empty(len(scores), 0, dtype=torch.long, device=scores.device)


def _refuse_nan(logits: Tensor, place: Place) -> None:
    if bool(logits.isnan().any()):
        raise UnsupportedModelError(
            f"the model's logits after the first {place.position:,} tokens are not numbers (NaN); if its weights are "
            f"sound, take a dtype with more range than {str(logits.dtype).removeprefix('torch.')}"
        )


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


def accept_one(
    p: Tensor | Callable[[], Tensor], q: Tensor, tokens: Sequence[int], choices: Choices, ratio: float | None = None
) -> int:
    """Accept one of several candidates, or draw another token, so that what comes out is distributed as ``p``.

    For a single candidate this is the rule of speculative sampling (arXiv 2211.17192, 2302.01318): token x is accepted
    with min(1, p(x)/q(x)); else the token is drawn from max(p - q, 0), normalised. With several, drawn from q one after
    the other without replacement, each rejection leaves the same question for what remains of p and q (SpecInfer, arXiv
    2305.09781; Sequoia, arXiv 2402.12374).

    Args:
        p: (V,), the judge's distribution. Where ``ratio`` says enough of it to begin with, what computes it will do.
        q: (V,), the distribution that the first candidate was really drawn from.
        tokens: the candidates, in the order of drawing.
        choices: the source of chance.
        ratio: p / q of the first candidate, if it is known.
    """
    for token in tokens:
        odds = ratio if ratio is not None else float(_value(p)[token] / q[token])
        if choices.accept(min(1.0, odds)):
            return token
        p, q, ratio = residual(_value(p), q), without(q, token), None
    return choices.draw(_value(p))


def _value(p: Tensor | Callable[[], Tensor]) -> Tensor:
    return p if isinstance(p, Tensor) else p()


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
