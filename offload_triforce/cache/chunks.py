"""Where chosen chunks are kept: a slot for each, per layer and KV head."""

from __future__ import annotations

import torch
from torch import Tensor

from offload_triforce.kernels import ops


class ChunkStore:
    """Chunks in the dtype of the model, [layers, 2, K, slots, chunk, D]. Which chunk is in which slot is not known here."""

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        slots: int,
        chunk: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.chunk = chunk
        self.kv = torch.zeros(layers, 2, kv_heads, slots, chunk, head_dim, dtype=dtype, device=device)

    def put(self, layer: int, source: Tensor, kv: Tensor) -> None:
        """Copy chunks out of a tile, ``kv`` [2, K, C*chunk, D], into slots; ``source`` is of ``ops.select_chunks``."""
        ops.gather_chunks(source, kv, self.kv[layer])

    def keys(self, layer: int, filled: int) -> Tensor:
        """Keys of the first ``filled`` slots of one layer, [K, filled*chunk, D]."""
        return self.kv[layer, 0, :, :filled].flatten(1, 2)

    def attend_on(self, attention: ops.RunningAttention, layer: int, filled: int) -> None:
        """Take the first ``filled`` slots of one layer into an attention that has begun. All queries see them."""
        key, value = self.kv[layer, :, :, :filled].flatten(2, 3)
        attention.update(key, value)
