"""Where chosen chunks are kept: a slot for each, per layer and KV head, as they are or packed into fewer bits."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from offload_triforce.kernels import ops


class ChunkStore(Protocol):
    """Slots for chunks. Which chunk is in which slot is not known here."""

    def calibrate(self, layer: int, key: Tensor) -> None:
        """Look at the keys of a layer's prompt, [K, n, D], before anything is put there."""

    def slots(self, layer: int) -> Tensor | ops.CodedChunks:
        """One layer's slots, for ``ops.take_chunks``."""

    def keys(self, layer: int, filled: int) -> Tensor:
        """Keys of the first ``filled`` slots of one layer, [K, filled*chunk, D]."""

    def attend_on(self, attention: ops.RunningAttention, layer: int, filled: int) -> None:
        """Take the first ``filled`` slots of one layer into an attention that has begun. All queries see them."""

    def attend_static(self, attention: ops.RunningAttention, layer: int, tokens: Tensor) -> None:
        """The same in a step of fixed work: how many ``tokens`` are there is told by the device, int64 [1]."""

    def parts(self) -> dict[str, Tensor]:
        """The memory that all of it lies in, by name."""


def make_store(
    layers: int,
    kv_heads: int,
    slots: int,
    chunk: int,
    head_dim: int,
    bits: int,
    dtype: torch.dtype,
    device: torch.device,
) -> ChunkStore:
    """A store of chunks in ``bits`` per number: 4, 8, or 16 for the dtype of the model as it is."""
    if bits == 16:
        return PlainChunks(torch.zeros(layers, 2, kv_heads, slots, chunk, head_dim, dtype=dtype, device=device))
    return PackedChunks(layers, kv_heads, slots, chunk, head_dim, bits, dtype, device)


class PlainChunks:
    """In the dtype of the model: ``kv`` [layers, 2, K, slots, chunk, D]."""

    def __init__(self, kv: Tensor) -> None:
        self.kv = kv

    def parts(self) -> dict[str, Tensor]:
        """See ``ChunkStore``."""
        return {"chunks": self.kv}

    def calibrate(self, layer: int, key: Tensor) -> None:
        """Nothing to do."""

    def slots(self, layer: int) -> Tensor:
        """See ``ChunkStore``."""
        return self.kv[layer]

    def keys(self, layer: int, filled: int) -> Tensor:
        """See ``ChunkStore``."""
        return self.kv[layer, 0, :, :filled].flatten(1, 2)

    def attend_on(self, attention: ops.RunningAttention, layer: int, filled: int) -> None:
        """See ``ChunkStore``."""
        key, value = self.kv[layer, :, :, :filled].flatten(2, 3)
        attention.update(key, value)

    def attend_static(self, attention: ops.RunningAttention, layer: int, tokens: Tensor) -> None:
        """See ``ChunkStore``."""
        key, value = self.kv[layer].flatten(2, 3)
        attention.update_first(key, value, tokens)


class PackedChunks:
    """In 4 or 8 bits, see ``kernels.reference_codec``."""

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        slots: int,
        chunk: int,
        head_dim: int,
        bits: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """``dtype``: of the model's keys and values."""
        self.dtype = dtype
        rows, row = (layers, kv_heads, slots), head_dim * bits // 8
        self.coded = ops.CodedChunks(
            key_codes=torch.zeros(*rows, chunk, row, dtype=torch.uint8, device=device),
            value_codes=torch.zeros(*rows, chunk, row, dtype=torch.uint8, device=device),
            key_low=torch.zeros(*rows, head_dim, dtype=torch.uint8, device=device),
            key_step=torch.ones(*rows, head_dim, dtype=torch.uint8, device=device),
            value_low=torch.zeros(*rows, chunk, dtype=torch.float16, device=device),
            value_step=torch.ones(*rows, chunk, dtype=torch.float16, device=device),
            floor=torch.full((layers, kv_heads, head_dim), -8.0, device=device),
            spread=torch.full((layers, kv_heads, head_dim), 16.0, device=device),
        )
        self._layers = [ops.CodedChunks(*(part[layer] for part in self.coded)) for layer in range(layers)]

    def slots(self, layer: int) -> ops.CodedChunks:
        """See ``ChunkStore``."""
        return self._layers[layer]

    def parts(self) -> dict[str, Tensor]:
        """See ``ChunkStore``."""
        return self.coded._asdict()

    def calibrate(self, layer: int, key: Tensor) -> None:
        """The range of each channel, and a little more for what is yet to come."""
        coded = self.slots(layer)
        low, high = key.amin(1).float(), key.amax(1).float()
        spread = (1.2 * (high - low)).clamp(min=1e-3)
        coded.spread.copy_(spread)
        coded.floor.copy_((low + high - spread) / 2)

    def keys(self, layer: int, filled: int) -> Tensor:
        """See ``ChunkStore``."""
        return ops.decode_keys(self.slots(layer), filled, self.dtype)

    def attend_on(self, attention: ops.RunningAttention, layer: int, filled: int) -> None:
        """See ``ChunkStore``."""
        attention.update_coded(self.slots(layer), filled)

    def attend_static(self, attention: ops.RunningAttention, layer: int, tokens: Tensor) -> None:
        """See ``ChunkStore``."""
        attention.update_coded(self.slots(layer), tokens=tokens)
