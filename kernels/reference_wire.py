"""Lossless coding of tiles in plain torch: the eager twins. ``wire_format`` says what is coded how."""

from __future__ import annotations

import torch
from torch import Tensor

from offload_triforce.kernels.wire_format import (
    BLOCK,
    ESCAPE,
    EXTENSION,
    GROUP,
    LEVELS,
    NEAR,
    WireFormat,
    parts,
)


def wire_encode(kv: Tensor, coded: Tensor, format: WireFormat) -> None:
    """Code a tile.

    Args:
        kv: [2, K, tile_tokens, D] in the format's dtype; the last dimension contiguous.
        coded: uint8 [format.bytes], is written. Its first int32 is how many bytes found no room in it: unless that is
            0, the tile cannot be decoded. Its second int32 is how many of its bytes are in use.
    """
    part, mantissa = parts(coded, format), format.mantissa
    bits = kv.view(torch.int16).int() & 0xFFFF
    rest = (bits >> 15) << mantissa | bits & (1 << mantissa) - 1
    part.rests.copy_(rest & 0xFF)
    if part.highs is not None:
        part.highs.copy_(_planes(rest >> 8, format.high_bits))

    exponent = (bits & 0x7FFF) >> mantissa
    there = _blocks(torch.ones_like(exponent)).bool()
    exponent = _blocks(exponent)
    level = _levels(exponent, there)
    part.levels.copy_(level)
    below = torch.where(there, level[:, :, :, None] - exponent, 0)
    code = torch.where((below < 0) | (below >= NEAR), NEAR, below)
    part.codes.copy_(_planes(code.flatten(2, 3)[:, :, : format.tile_tokens], 2))

    below, exponent, missed = _in_order(below), _in_order(exponent), _in_order(code) == NEAR
    extension = _extensions(below)
    escaped = missed & (extension == ESCAPE)
    ends = _extension_ends(missed)
    sizes = ends + escaped.sum(1)
    starts = sizes.cumsum(0) - sizes
    used = starts[-1] + sizes[-1]
    part.header.copy_(torch.stack(((used - format.room).clamp(min=0), format.begins[-1] + used)))
    part.sizes.copy_(sizes)
    part.starts.copy_(starts)
    fits = (starts + sizes <= format.room)[:, None]
    _put(part.room, 8 * starts[:, None] + EXTENSION * _ranks(missed), extension, EXTENSION, missed & fits)
    _put(part.room, 8 * (starts + ends)[:, None] + 8 * _ranks(escaped), exponent, 8, escaped & fits)


def wire_decode(coded: Tensor, kv: Tensor, format: WireFormat) -> None:
    """Decode a tile into ``kv`` [2, K, tile_tokens, D], bit for bit. See ``wire_encode``."""
    part, mantissa = parts(coded, format), format.mantissa
    code = _in_order(_blocks(_values(part.codes)))
    starts, missed = part.starts.long(), code == NEAR
    extension = _take(part.room, 8 * starts[:, None] + EXTENSION * _ranks(missed), EXTENSION)
    escaped = missed & (extension == ESCAPE)
    escape = _take(part.room, 8 * (starts + _extension_ends(missed))[:, None] + 8 * _ranks(escaped), 8)
    below = torch.where(missed, torch.where(extension < 2, -1 - extension, extension + 1), code)
    level = part.levels.int()[:, :, :, None].expand(-1, -1, -1, BLOCK, -1)
    exponent = torch.where(escaped, escape, _in_order(level) - below)
    exponent = _from_order(exponent, level.shape).flatten(2, 3)[:, :, : format.tile_tokens]
    rest = part.rests.int()
    if part.highs is not None:
        rest = rest | _values(part.highs) << 8
    kv.view(torch.int16).copy_((rest >> mantissa) << 15 | exponent << mantissa | rest & (1 << mantissa) - 1)


def _levels(exponent: Tensor, there: Tensor) -> Tensor:
    """The level of each block, [2, K, S, D]: of those that leave the fewest misses, the highest."""
    top = torch.where(there, exponent, 0).amax(3)
    below = torch.where(there, top[:, :, :, None] - exponent, -1)
    lower, most = torch.zeros_like(top), ((below >= 0) & (below < NEAR)).sum(3)
    for tried in range(1, LEVELS):
        hits = ((below >= tried) & (below < tried + NEAR)).sum(3)
        lower, most = torch.where(hits > most, tried, lower), torch.maximum(hits, most)
    return top - lower


def _extensions(below: Tensor) -> Tensor:
    """Of misses so far below their level: 1 and 2 above it are 0 and 1, 3 to 7 below it are 2 to 6."""
    extension = torch.where(below < 0, -1 - below, below - 1)
    return torch.where((below < -2) | (extension > ESCAPE), ESCAPE, extension)


def _extension_ends(missed: Tensor) -> Tensor:
    """How many bytes the extensions of each region take: int64 [regions]."""
    return (missed.sum(1) * EXTENSION + 7) // 8


def _ranks(flags: Tensor) -> Tensor:
    """How many are set before each, in its region."""
    return flags.long().cumsum(1) - flags.long()


def _blocks(values: Tensor) -> Tensor:
    """[2, K, T, D] as [2, K, S, BLOCK, D]; what the last block lacks is 0."""
    return torch.nn.functional.pad(values, (0, 0, 0, -values.shape[2] % BLOCK)).unflatten(2, (-1, BLOCK))


def _in_order(values: Tensor) -> Tensor:
    """[2, K, S, BLOCK, D] as [regions, BLOCK * D], by group of tokens, channel, token of the group."""
    return values.unflatten(3, (-1, GROUP)).transpose(4, 5).flatten(0, 2).flatten(1)


def _from_order(values: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of ``_in_order``."""
    return values.view(*shape[:3], BLOCK // GROUP, shape[4], GROUP).transpose(4, 5).reshape(shape)


def _planes(values: Tensor, bits: int) -> Tensor:
    """[2, K, T, D] of so many bits as planes, uint8 [2, K, T / 8, bits, D]: bit t of a byte is of the t-th token."""
    values = values.unflatten(2, (-1, 1, GROUP))
    steps = (_steps(bits, 1).to(values.device), _steps(GROUP, 0).to(values.device))
    return ((values >> steps[0] & 1) << steps[1]).sum(4).to(torch.uint8)


def _values(planes: Tensor) -> Tensor:
    """The inverse of ``_planes``, int32."""
    bits = planes.int()[:, :, :, :, None] >> _steps(GROUP, 0).to(planes.device) & 1
    return (bits << _steps(planes.shape[3], 1).to(planes.device)).sum(3).flatten(2, 3).int()


def _steps(count: int, behind: int) -> Tensor:
    """0, 1, 2, ... along the dimension that has so many, and a last one, behind it."""
    return torch.arange(count, dtype=torch.int32).view(count, *[1] * (behind + 1))


def _put(room: Tensor, places: Tensor, numbers: Tensor, bits: int, taken: Tensor) -> None:
    """Write the ``taken`` of the numbers, of so many bits each, to ``places``, which count bits.

    No two numbers share a bit, so those that share a byte may be added up; bits that nobody writes become 0.
    """
    places, numbers = places[taken], numbers[taken]
    sums = torch.zeros(room.shape[0] + 1, dtype=torch.int32, device=room.device)
    low, shifted = places // 8, numbers << (places % 8)
    sums.index_add_(0, low, (shifted & 0xFF).int())
    sums.index_add_(0, low + 1, (shifted >> 8).int())
    touched = torch.zeros(room.shape[0] + 1, dtype=torch.bool, device=room.device)
    touched[low] = True
    touched[(places + bits - 1) // 8] = True
    room.copy_(torch.where(touched[:-1], sums[:-1].to(torch.uint8), room))


def _take(room: Tensor, places: Tensor, bits: int) -> Tensor:
    """Numbers of so many bits at ``places``, which count bits; of places that do not exist, anything."""
    low = places // 8
    both = room[low.clamp(0, room.shape[0] - 1)].int() | room[(low + 1).clamp(0, room.shape[0] - 1)].int() << 8
    return both >> (places % 8) & (1 << bits) - 1
