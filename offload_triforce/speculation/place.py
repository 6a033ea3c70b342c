"""Places of a text where a token is wanted, and what is known of the path that leads there."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList


class PathState:
    """What is known at one place of a path of draft tokens, and belongs to this place alone.

    Attributes:
        before: the state at the place before; None where the target itself is what went before.
        processors: copies of the request's logits processors, as they stand once this place has been asked about; None
            until then, and where they failed.
        hidden: the retrieval level's hidden state [width] of the path's last token, where a drafter reads it.
    """

    __slots__ = ("before", "hidden", "processors")

    def __init__(self, before: PathState | None = None) -> None:
        self.before = before
        self.processors: LogitsProcessorList | None = None
        self.hidden: Tensor | None = None


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
