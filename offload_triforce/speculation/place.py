"""Places of a text where a token is wanted, and how forkable logits processors stand there."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList


class PathState:
    """A request's logits processors at one place of a path of draft tokens: copies that belong to this place alone.

    Attributes:
        before: the state at the place before; None where the target itself is what went before.
        processors: as they stand once this place has been asked about; None until then, and where they failed.
    """

    __slots__ = ("before", "processors")

    def __init__(self, before: PathState | None = None) -> None:
        self.before = before
        self.processors: LogitsProcessorList | None = None


class Place(NamedTuple):
    """Where a token is wanted.

    Attributes:
        prefix: puts the ids (n,) that it follows on a device.
        position: in the text.
        state: of the forkable processors; None leaves them out.
    """

    prefix: Callable[[torch.device], Tensor]
    position: int
    state: PathState | None = None
