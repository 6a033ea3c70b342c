"""Why an answer ends: asked of the criteria once for every token, where they are asked anyway."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria
from transformers.generation import EosTokenCriteria

STOP, STOP_STRING, MAX_TIME, LENGTH = "stop", "stop_string", "max_time", "length"
_NAMES = {
    EosTokenCriteria: STOP,
    StopStringCriteria: STOP_STRING,
    MaxTimeCriteria: MAX_TIME,
    MaxLengthCriteria: LENGTH,
}


def ending(criteria: Iterable[Callable[..., Tensor]], ids: Tensor) -> str | None:
    """Why a text ends after its newest token; None if it goes on.

    Every criterion is asked, in order, also behind one that ends the text: it may count how often.

    Args:
        criteria: stopping criteria of transformers. ids: the text, (n,).

    Returns:
        "stop" for an end-of-text token, "stop_string", "max_time", "length", or the name of a class or function of
        the caller's; of several, the first in this order, the caller's own before the length.
    """
    ends = [criterion for criterion in criteria if bool(torch.as_tensor(criterion(ids[None], None)).all())]
    if not ends:
        return None
    names = {_name(criterion) for criterion in ends}
    own = sorted(names - set(_NAMES.values()))
    return next(name for name in (STOP, STOP_STRING, MAX_TIME, *own, LENGTH) if name in names)


def _name(criterion: object) -> str:
    for kind, name in _NAMES.items():
        if isinstance(criterion, kind):
            return name
    return getattr(criterion, "__name__", type(criterion).__name__)
