"""What is kept of a group of tokens that a stopped prefill has read in part.

A prefill takes a group layer by layer, so where it is stopped, no token of the group is through all layers. What the
layers have made of the tokens till then, and their hidden states, are kept in host memory. A prompt that goes on with
all tokens of the group takes up the work at the very step where it was left.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from offload_triforce.cache.layer import Snapshot
from offload_triforce.model.prefill import Halt


@dataclass(frozen=True)
class PartRead:
    """What there is of a group.

    Attributes:
        held: tokens of the text before it. tokens: ids of the group, (n,) on the CPU.
        chunk: tokens of a step. layers: of the model.
        halt: where it was stopped. hidden: of the newest hidden states, where a drafter reads such and there are any.
    """

    held: int
    tokens: Tensor
    chunk: int
    layers: int
    halt: Halt
    hidden: Snapshot = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes in host memory."""
        return self.halt.size + sum(part.nbytes for part in self.hidden.values())

    @property
    def steps(self) -> int:
        """Chunks that went through a layer, summed up over all layers."""
        return self.halt.layer * -(-len(self.tokens) // self.chunk) + self.halt.chunk

    @property
    def worth(self) -> int:
        """Reading so many tokens whole would have been about as much work; at least 1."""
        return max(1, self.steps * self.chunk // self.layers)

    def begins(self, rest: Tensor) -> bool:
        """Whether all tokens of the group are the first of those that follow what is held, (m,)."""
        return torch.equal(self.tokens, rest[: len(self.tokens)])
