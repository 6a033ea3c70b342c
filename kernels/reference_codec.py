"""Eager twins of the codec that packs chosen chunks into 4 or 8 bits, in plain torch, on any device.

Keys of neighbouring tokens differ little in each channel, less than channels differ among each other or than one
token's channels do: so each chunk has a range per channel. Values have a range per token. Both are affine: low +
step * code. The keys' ranges are themselves held in 8 bits, as shares of a fixed range per channel (``floor``,
``spread``).
With chunks of 8 tokens and D = 128, 4 bits take 5.1 bits per number in all, and 8 bits 9.1.

Shapes as in ``reference``; k is slots. A byte of 4-bit codes holds channel d in its low half and d + D/2 in its high.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offload_triforce.kernels.types import CodedChunks


def encode_chunks(source: Tensor, kv: Tensor, coded: CodedChunks) -> None:
    """Pack the chunks that enter out of a tile: ``kv`` [2, K, C*chunk, D] into the slots of ``coded``.

    ``source`` [K, k] is what ``select_chunks`` returned. What lies outside of the fixed range is moved to its edge.
    """
    head, slot = (source >= 0).nonzero(as_tuple=True)
    chunks = kv.unflatten(2, (-1, coded.chunk))[:, head, source[head, slot]].float()  # [2, n, chunk, D]
    key, value, levels = chunks[0], chunks[1], 2**coded.bits - 1
    floor, spread = coded.floor[head], coded.spread[head]  # [n, D]
    low = ((key.amin(1) - floor) / spread * 255).floor().clamp(0, 255)
    least = floor + spread * low / 255
    step = ((key.amax(1) - least) / spread * 255).ceil().clamp(1, 255)
    codes = ((key - least[:, None]) / (spread / levels * step / 255)[:, None] + 0.5).floor().clamp(0, levels)
    coded.key_low[head, slot], coded.key_step[head, slot] = low.byte(), step.byte()
    coded.key_codes[head, slot] = pack(codes.byte(), coded.bits)
    low = value.amin(2).half()
    step = ((value.amax(2) - low.float()) / levels).half().clamp(min=LEAST_STEP)
    codes = ((value - low.float()[..., None]) / step.float()[..., None] + 0.5).floor().clamp(0, levels)
    coded.value_low[head, slot], coded.value_step[head, slot] = low, step
    coded.value_codes[head, slot] = pack(codes.byte(), coded.bits)


LEAST_STEP = 2.0**-14  # the smallest normal float16


def decode_keys(coded: CodedChunks, slots: int) -> Tensor:
    """Keys of the first ``slots`` slots, float32 [K, slots * chunk, D]."""
    scale = coded.spread / 255
    low = coded.floor[:, None] + scale[:, None] * coded.key_low[:, :slots]
    step = (scale / (2**coded.bits - 1))[:, None] * coded.key_step[:, :slots]
    codes = unpack(coded.key_codes[:, :slots], coded.bits)
    return (low[:, :, None] + step[:, :, None] * codes).flatten(1, 2)


def decode_values(coded: CodedChunks, slots: int) -> Tensor:
    """Values of the first ``slots`` slots, float32 [K, slots * chunk, D]."""
    low, step = coded.value_low[:, :slots].float(), coded.value_step[:, :slots].float()
    codes = unpack(coded.value_codes[:, :slots], coded.bits)
    return (low[..., None] + step[..., None] * codes).flatten(1, 2)


def decode_chunks(coded: CodedChunks, slots: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the first ``slots`` slots, float32 [K, slots * chunk, D] each."""
    return decode_keys(coded, slots), decode_values(coded, slots)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., D] of numbers below 2^bits to bytes [..., D * bits / 8]."""
    if bits == 8:
        return codes
    low, high = codes.chunk(2, dim=-1)
    return low | (high << 4)


def unpack(codes: Tensor, bits: int) -> Tensor:
    """The inverse of ``pack``, as float32."""
    if bits == 8:
        return codes.float()
    return torch.cat([codes & 15, codes >> 4], dim=-1).float()
