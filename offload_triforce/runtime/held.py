"""A text apart from any caches: what a session keeps in memory while another one has them, and what lies on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from offload_triforce.cache.full import FullCache
from offload_triforce.cache.layer import Snapshot
from offload_triforce.model.layout import ModelLayout
from offload_triforce.runtime.part import PartRead


@dataclass(frozen=True)
class KVShape:
    """Of the layers that attend to everything: their number, KV heads K, head dimension D, and the dtype."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, layout: ModelLayout) -> KVShape:
        """What the full cache holds of a model."""
        if not layout.full:
            return cls(0, 1, 1, layout.dtype)
        shape = layout.layers[layout.full[0]]
        return cls(len(layout.full), shape.kv_heads, shape.head_dim, layout.dtype)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all of these layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """What a text of ``tokens`` tokens has left in caches that cannot be cut at will: windows and recurrent states.

    ``parts`` by name, as ``TargetCaches.checkpoint`` has them, in host memory.
    """

    tokens: int
    parts: Snapshot

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(part.nbytes for part in self.parts.values())


def thin(points: Sequence[Checkpoint], limit: int) -> list[Checkpoint]:
    """As many of them as ``limit`` bytes hold; but the first and the last always.

    Those go first whose neighbours are nearest, the older of them: what is asked again is the beginning, or the end.
    """
    kept = list(points)
    while len(kept) > 2 and sum(point.size for point in kept) > limit:
        inner = range(1, len(kept) - 1)
        del kept[min(inner, key=lambda i: kept[i + 1].tokens - kept[i - 1].tokens)]
    return kept


class TextSource(Protocol):
    """A text that was read, wherever it lies: in caches, in host memory or on disk.

    Attributes:
        tokens: ids of all n tokens that have been read, int64 (n,), on the CPU.
        checkpoints: ascending; the last is of all n tokens. None, where caches can be cut anywhere.
        shape: of the keys and values.
        long: whether keys were turned by longrope's long frequencies; False for all other models.
        part: of the tokens behind them, what a stopped prefill has read.
    """

    tokens: Tensor
    checkpoints: Sequence[Checkpoint]
    shape: KVShape
    long: bool
    part: PartRead | None

    def read(self, layer: int, start: int, stop: int) -> Tensor:
        """Keys and values of tokens [start, stop) of one layer, [2, K, stop - start, D], in host memory.

        ``layer`` is counted among those that attend to everything. It may be a view: it is not to be written to.
        """


@dataclass
class LiveText:
    """A text in the caches, see ``TextSource``. ``full`` may be None, where no layer attends to everything."""

    tokens: Tensor
    checkpoints: Sequence[Checkpoint]
    shape: KVShape
    full: FullCache | None
    long: bool = False
    part: PartRead | None = None

    def read(self, layer: int, start: int, stop: int) -> Tensor:
        """See ``TextSource``."""
        return self.full.copy_out(layer, start, stop)


@dataclass
class HeldText:
    """A text in plain host memory, see ``TextSource``. ``kv``: [2, K, n, D] of each layer."""

    tokens: Tensor
    checkpoints: Sequence[Checkpoint]
    shape: KVShape
    kv: Sequence[Tensor]
    long: bool = False
    part: PartRead | None = None

    @classmethod
    def copy(cls, source: TextSource) -> HeldText:
        """The same text in memory of its own."""
        count = len(source.tokens)
        kv = [source.read(layer, 0, count).clone() for layer in range(source.shape.layers)]
        return cls(source.tokens, list(source.checkpoints), source.shape, kv, source.long, source.part)

    def read(self, layer: int, start: int, stop: int) -> Tensor:
        """See ``TextSource``."""
        return self.kv[layer][:, :, start:stop]

    @property
    def size(self) -> int:
        """Bytes."""
        return text_bytes(self)


def text_bytes(source: TextSource) -> int:
    """Bytes of a text in host memory, or what it would take there."""
    part = 0 if source.part is None else source.part.size
    return len(source.tokens) * source.shape.token_bytes + sum(point.size for point in source.checkpoints) + part
