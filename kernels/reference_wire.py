"""Lossless coding of tiles in plain torch: the eager twins. ``wire_format`` says where the parts lie."""

from __future__ import annotations

import torch
from torch import Tensor

from offload_triforce.kernels.wire_format import BLOCK, GROUP, MANTISSA, WireFormat

ESCAPE = 7


def wire_encode(kv: Tensor, coded: Tensor, format: WireFormat) -> None:
    """Code a tile.

    Args:
        kv: [2, K, tile_tokens, D] in the format's dtype; the last dimension contiguous.
        coded: uint8 [format.bytes], is written. Its first int32 is how many escapes found no room; unless it is 0,
            the tile cannot be decoded.
    """
    starts, tops, codes, rests, highs, escapes = _parts(coded, format)
    exponent, rest = _split(kv.contiguous().view(torch.int16).int() & 0xFFFF, format)
    exponent = _in_blocks(exponent)  # [2, K, S, BLOCK, D]
    top = exponent.amax(3)
    tops.copy_(top)
    offset = (top[:, :, :, None] - exponent).clamp(max=ESCAPE)
    tokens = format.tile_tokens
    escaped = (offset == ESCAPE) & (torch.arange(BLOCK * top.shape[2], device=kv.device) < tokens).view(-1, BLOCK, 1)
    codes.copy_(_planes(offset.flatten(2, 3)[:, :, :tokens], 3))
    rests.copy_(rest & 0xFF)
    if highs is not None:
        highs.copy_(_planes(rest >> 8, highs.shape[3]))
    counts = escaped.flatten(3).sum(3).flatten()
    total = counts.cumsum(0)
    starts.copy_(total - counts)
    missing = (total[-1:] - format.room).clamp(min=0)
    header = coded[:4].view(torch.int32)
    header.copy_(missing)
    rank = _in_order(escaped).long().cumsum(0) - 1
    fits = _in_order(escaped) & (rank < format.room)
    escapes[rank[fits]] = _in_order(exponent)[fits].to(torch.uint8)


def wire_decode(coded: Tensor, kv: Tensor, format: WireFormat) -> None:
    """Decode a tile into ``kv`` [2, K, tile_tokens, D], bit for bit. See ``wire_encode``."""
    _, tops, codes, rests, highs, escapes = _parts(coded, format)
    tokens = format.tile_tokens
    offset = _in_blocks(_values(codes), fill=0)
    escaped = offset == ESCAPE
    exponent = tops[:, :, :, None].int() - offset
    order = _in_order(escaped)
    rank = (order.long().cumsum(0) - 1).clamp(0, max(0, format.room - 1))
    wide = torch.where(order, escapes[rank].int(), _in_order(exponent))
    exponent = _from_order(wide, exponent.shape).flatten(2, 3)[:, :, :tokens]
    rest = rests.int()
    if highs is not None:
        rest = rest | _values(highs) << 8
    mantissa = MANTISSA[format.dtype]
    bits = (rest >> mantissa) << 15 | exponent << mantissa | rest & (1 << mantissa) - 1
    kv.view(torch.int16).copy_(bits)


def _parts(coded: Tensor, format: WireFormat) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    heads, tokens, dim = format.kv_heads, format.tile_tokens, format.head_dim
    begin = format.offsets
    starts = coded[begin[0] :][: 4 * format.regions].view(torch.int32)
    tops = coded[begin[1] :][: format.regions * dim].view(2, heads, -1, dim)
    codes = coded[begin[2] :][: format.values // GROUP * 3].view(2, heads, tokens // GROUP, 3, dim)
    rests = coded[begin[3] :][: format.values].view(2, heads, tokens, dim)
    high = MANTISSA[format.dtype] - 7
    highs = coded[begin[4] :][: format.values // GROUP * high].view(2, heads, -1, high, dim) if high else None
    return starts, tops, codes, rests, highs, coded[begin[5] :][: format.room]


def _split(bits: Tensor, format: WireFormat) -> tuple[Tensor, Tensor]:
    """Exponents, and the sign in front of the mantissa."""
    mantissa = MANTISSA[format.dtype]
    return (bits & 0x7FFF) >> mantissa, (bits >> 15) << mantissa | bits & (1 << mantissa) - 1


def _in_blocks(values: Tensor, fill: int = -1) -> Tensor:
    """[2, K, T, D] as [2, K, S, BLOCK, D]; what is missing of the last block is ``fill``."""
    missing = -values.shape[2] % BLOCK
    return torch.nn.functional.pad(values, (0, 0, 0, missing), value=fill).unflatten(2, (-1, BLOCK))


def _in_order(values: Tensor) -> Tensor:
    """[2, K, S, BLOCK, D] as one row in the order of escapes: by group of tokens, channel, token of the group."""
    return values.unflatten(3, (-1, GROUP)).transpose(4, 5).flatten()


def _from_order(row: Tensor, shape: torch.Size) -> Tensor:
    *outer, block, dim = shape
    return row.view(*outer, block // GROUP, dim, GROUP).transpose(4, 5).reshape(shape)


def _planes(values: Tensor, bits: int) -> Tensor:
    """[2, K, T, D] of so many bits as planes, [2, K, T / 8, bits, D]: bit t of a byte is of token t of its group."""
    values = values.unflatten(2, (-1, 1, GROUP))
    place = torch.arange(bits, device=values.device).view(bits, 1, 1)
    token = torch.arange(GROUP, device=values.device).view(GROUP, 1)
    return ((values >> place & 1) << token).sum(4).to(torch.uint8)


def _values(planes: Tensor) -> Tensor:
    """The inverse of ``_planes``: int32 [2, K, T, D]."""
    bits = planes.shape[3]
    place = torch.arange(bits, device=planes.device).view(bits, 1, 1)
    token = torch.arange(GROUP, device=planes.device).view(GROUP, 1)
    return ((planes.int()[:, :, :, :, None] >> token & 1) << place).sum(3).flatten(2, 3).int()
