"""A text apart from any caches: what a session keeps in memory while another one has them, and what lies on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from offload_triforce.cache.layer import Snapshot


@dataclass(frozen=True)
class KVShape:
    """Of the layers that attend to everything: their number, KV heads K, head dimension D, and the dtype."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all of these layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """What a text of ``tokens`` tokens has left behind in caches that cannot be cut at will, in host memory.

    ``parts`` by name, as ``TargetCaches.snapshot`` has them: windows, recurrent states, and maybe the retrieval
    cache's choice, without which the next reading chooses anew.
    """

    tokens: int
    parts: Snapshot

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(part.nbytes for part in self.parts.values())


class TextSource(Protocol):
    """A text that was read, wherever it lies: in caches, in host memory or on disk.

    Attributes:
        tokens: ids of all n tokens that have been read.
        checkpoints: ascending; the last is of all n tokens.
        shape: of the keys and values.
        long: whether keys were turned by longrope's long frequencies; False for all other models.
    """

    @property
    def tokens(self) -> Sequence[int]: ...

    @property
    def checkpoints(self) -> Sequence[Checkpoint]: ...

    @property
    def shape(self) -> KVShape: ...

    @property
    def long(self) -> bool: ...

    def read(self, layer: int, start: int, stop: int) -> Tensor:
        """Keys and values of tokens [start, stop) of one layer, [2, K, stop - start, D], in host memory.

        ``layer`` is counted among those that attend to everything. It may be a view: it is not to be written to.
        """


@dataclass(frozen=True)
class HeldText:
    """A text in plain host memory, see ``TextSource``. ``kv``: [2, K, n, D] of each layer."""

    tokens: Sequence[int]
    checkpoints: Sequence[Checkpoint]
    shape: KVShape
    kv: Sequence[Tensor]
    long: bool = False

    def read(self, layer: int, start: int, stop: int) -> Tensor:
        """See ``TextSource``."""
        return self.kv[layer][:, :, start:stop]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(part.nbytes for part in self.kv) + sum(point.size for point in self.checkpoints)
