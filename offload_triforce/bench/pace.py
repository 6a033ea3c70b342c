"""Work that is held up, so that all of it is as many times slower here as on a card.

A CPU does one token at a time nearly as fast as its memory allows, and many in proportion to their number, where a
card takes them in hardly more time than one. So narrow steps and passes get a pause in each layer: copies go on
meanwhile, as they would beside a computation that takes so long.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from offload_triforce.model.layers import layers_of
from offload_triforce.runtime.levels import RetrievalLevel, TargetLevel

# A piece of work: "step" or "pass", and the tokens that it reads.
Work = tuple[str, int]


class Pace:
    """Seconds by which pieces of work are held up; between those that are given, on a straight line."""

    def __init__(self, pauses: Mapping[Work, float]) -> None:
        """``pauses``: of every kind of work, some."""
        self._known: dict[str, tuple[Sequence[int], Sequence[float]]] = {}
        for kind in {kind for kind, _ in pauses}:
            known = sorted((tokens, seconds) for (other, tokens), seconds in pauses.items() if other == kind)
            self._known[kind] = tuple(zip(*known, strict=True))

    def pause(self, kind: str, tokens: int) -> float:
        """Seconds for that piece of work."""
        return float(np.interp(tokens, *self._known[kind]))


@contextmanager
def paced(model: PreTrainedModel, pace: Pace | None) -> Iterator[None]:
    """Steps and passes of this model are held up meanwhile, each in equal parts after its layers."""
    layers = layers_of(model.get_decoder())

    def hold_up(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any], made: Any) -> None:
        kind = _kind(named.get("triforce"))
        if kind is not None:
            time.sleep(pace.pause(kind, given[0].shape[1]) / len(layers))

    hooks = [] if pace is None else [layer.register_forward_hook(hold_up, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _kind(view: object) -> str | None:
    """What the layers are at work on; None where it is neither."""
    if isinstance(view, TargetLevel):
        return "pass"
    return "step" if isinstance(view, RetrievalLevel) else None
