"""Which logits processors drafts may call, and how: as they are, in copies, or not at all.

The target calls every processor once per token, in the order of the text, just as ``generate`` of transformers does: so
whatever a processor is, it does there what it would do there. The levels below ask about places that may never come,
several times and in any order; a processor that keeps a state would be led astray by that. They call what is known
(or declared) to follow from ids and scores alone; of what can be copied, a copy for each place of the tree; and what
may be anything, not at all. That costs acceptance, and nothing else.
"""

from __future__ import annotations

import copy
import enum
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

from torch import Tensor
from transformers.generation import logits_process

from offload_triforce.errors import InputError

# How people declare a processor, or the function of a ``prefix_allowed_tokens_fn``.
STATELESS = "triforce_stateless"
FORKABLE = "triforce_forkable"

Processor = Callable[..., Any]
Declared = TypeVar("Declared")


class Kind(enum.Enum):
    """What a processor's answer follows from."""

    ROW = enum.auto()  # the scores of its row
    TEXT = enum.auto()  # ids and scores
    FORKS = enum.auto()  # ids, scores and a state that can be copied
    UNKNOWN = enum.auto()  # perhaps a state that nobody can copy


class ForkableProcessor(Protocol):
    """A logits processor with a state: it is called once for every token of one path, each call with one id more."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """As transformers calls it: ids [1, n] and scores [1, V] -> scores [1, V]."""

    def fork(self) -> ForkableProcessor:
        """A copy in the same state. What becomes of one must not show in the other."""


# transformers' own. All in these two lists were read in 5.17 and 5.24: what they keep between calls follows from their
# arguments. Not among them: those that count calls (SynthID, Dia), run a model (Whisper's no-speech detection,
# guidance) or take a batch of another size (guidance).
_ROW = (
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
)
_TEXT = (
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "RepetitionPenaltyLogitsProcessor",
    "EncoderRepetitionPenaltyLogitsProcessor",
    "TopHLogitsWarper",  # refuses all rows where it refuses one
    "NoRepeatNGramLogitsProcessor",
    "EncoderNoRepeatNGramLogitsProcessor",
    "SequenceBiasLogitsProcessor",
    "NoBadWordsLogitsProcessor",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
    "ExponentialDecayLengthPenalty",
    "LogitNormalization",
    "SuppressTokensAtBeginLogitsProcessor",
    "SuppressTokensLogitsProcessor",
    "WhisperTimeStampLogitsProcessor",
    "AlternatingCodebooksLogitsProcessor",
    "BarkEosPrioritizerLogitsProcessor",
    "WatermarkLogitsProcessor",
)
_KINDS = {getattr(logits_process, name): Kind.ROW for name in _ROW}
_KINDS |= {getattr(logits_process, name): Kind.TEXT for name in _TEXT}
_CONSTRAINED = logits_process.PrefixConstrainedLogitsProcessor
_FUNCTION = "_prefix_allowed_tokens_fn"
_SYNTHID = logits_process.SynthIDTextWatermarkLogitsProcessor


def stateless(thing: Declared) -> Declared:
    """Declare that a logits processor's answer follows from ids and scores alone, and nothing else changes by asking.

    Drafts then call it too, for places that may never come, in any order. To be used on a function, on an object or, as
    a decorator, on a class (whose subclasses have to be declared again); also on a ``prefix_allowed_tokens_fn``. The
    attribute ``triforce_stateless = True`` says the same.

    Raises:
        InputError: it takes no attributes.
    """
    return _declare(thing, STATELESS)


def forkable(thing: Declared) -> Declared:
    """Declare that ``copy.deepcopy`` of a logits processor (or a ``prefix_allowed_tokens_fn``) is independent of it.

    For those that keep a state and have no ``fork()`` of their own. Drafts then call copies. To be used like
    ``stateless``; the attribute ``triforce_forkable = True`` says the same.

    Raises:
        InputError: it takes no attributes.
    """
    return _declare(thing, FORKABLE)


def _declare(thing: Declared, attribute: str) -> Declared:
    try:
        setattr(thing, attribute, True)
    except (AttributeError, TypeError) as error:
        raise InputError(
            f"{name_of(thing)} takes no attributes ({error}); declare the function or the class that it comes from"
        ) from error
    return thing


def kind_of(processor: Processor) -> Kind:
    """What a processor's answer follows from, as far as anybody has said. A subclass may do what its class does not."""
    known = _KINDS.get(type(processor))
    if known is not None:
        return known
    subject = _subject(processor)
    if _says(subject, STATELESS):
        return Kind.TEXT
    if type(processor) is _SYNTHID or getattr(subject, FORKABLE, False) is True or _forks_itself(subject):
        return Kind.FORKS
    return Kind.UNKNOWN


def fork_of(processor: Processor) -> Processor:
    """A copy of a processor of kind ``FORKS``, in the same state."""
    if type(processor) is _SYNTHID:  # whose tensors are replaced, never written to
        twin = copy.copy(processor)
        twin.state = copy.copy(processor.state)
        return twin
    subject = _subject(processor)
    fork = subject.fork() if _forks_itself(subject) else copy.deepcopy(subject)
    if fork is subject:
        raise ValueError("its fork is itself")
    if subject is processor:
        return fork
    twin = copy.copy(processor)
    setattr(twin, _FUNCTION, fork)
    return twin


def check_forks(processors: Iterable[Processor]) -> None:
    """What says that it can be copied has to show it, once.

    Raises:
        InputError: names the processor that cannot be.
    """
    for processor in processors:
        if kind_of(processor) is not Kind.FORKS:
            continue
        try:
            fork_of(processor)
        except Exception as error:  # it is the user's code: whatever it raises
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"{name_of(processor)} cannot be forked ({reason}); let fork() return an independent copy, or declare "
                "nothing: then only the target calls it"
            ) from error


def target_only(processors: Iterable[Processor]) -> tuple[str, ...]:
    """The names of those that drafts have to do without."""
    return tuple(name_of(processor) for processor in processors if kind_of(processor) is Kind.UNKNOWN)


def name_of(processor: Processor) -> str:
    """What a user would know a processor by: its class, or the function it consists of."""
    subject = _subject(processor)
    return getattr(subject, "__name__", None) or type(subject).__name__


def _subject(processor: Processor) -> Processor:
    """What declarations are looked for on: of a ``prefix_allowed_tokens_fn``, the user's function and not its shell."""
    return getattr(processor, _FUNCTION, processor) if type(processor) is _CONSTRAINED else processor


def _says(subject: Processor, attribute: str) -> bool:
    """Whether the object itself, its very class, or the function behind a method carries a declaration."""
    holders = (getattr(subject, "__func__", subject), type(subject))
    return any(getattr(holder, "__dict__", {}).get(attribute) is True for holder in holders)


def _forks_itself(subject: Processor) -> bool:
    return callable(getattr(subject, "fork", None))
