"""Tiles to code, for tests of all three implementations."""

import torch
from hypothesis import strategies as st

from offload_triforce.kernels.wire_format import BLOCK, MANTISSA, WireFormat

HALVES = (torch.bfloat16, torch.float16)


def form_of(kv):
    return WireFormat(kv.shape[1], kv.shape[2], kv.shape[3], kv.dtype)


def encoded(codec, kv):
    coded = torch.zeros(form_of(kv).bytes, dtype=torch.uint8, device=kv.device)
    codec.wire_encode(kv, coded, form_of(kv))
    return coded


def missing(coded):
    return coded[:4].view(torch.int32).item()


def same_bits(one, other):
    return torch.equal(one.contiguous().view(torch.int16), other.contiguous().view(torch.int16))


def from_bits(bits, dtype):
    return torch.as_tensor(bits).to(torch.int16).view(dtype)


def check_identity(kv, codecs, decodes=None):
    """All write the same; if it ``decodes`` (None: where it does), all of them find every bit again."""
    coded = encoded(codecs[0], kv)
    for codec in codecs[1:]:
        assert torch.equal(encoded(codec, kv), coded)
    if decodes is not None:
        assert (missing(coded) == 0) == decodes
    for codec in codecs if missing(coded) == 0 else ():
        again = torch.full_like(kv, 7)
        codec.wire_decode(coded, again, form_of(kv))
        assert same_bits(again, kv)
    return coded


def every_value(dtype, dim):
    """All 65,536 bit patterns, next to their likes: [2, K, T, D]."""
    tokens = min(1 << 12, (1 << 15) // dim)
    return from_bits(torch.arange(1 << 16), dtype).view(2, -1, dim, tokens).transpose(2, 3).contiguous()


def to_the_last_byte(dtype):
    """A tile whose extensions, four of 3 bits, end in the last of two bytes of room. No value is written out."""
    exponents = torch.tensor([[10] * 8, [10, 10, 10, 10, 14, 13, 6, 5]]).view(2, 1, 8, 1)
    return from_bits(exponents << MANTISSA[dtype], dtype)


@st.composite
def tiles(draw, most_heads=3, most_groups=20, dims=(1, 8, 24, 64)):
    """Tiles of any bits at all, or of a few exponents per channel."""
    dtype = draw(st.sampled_from(HALVES))
    heads, tokens = draw(st.integers(1, most_heads)), 8 * draw(st.integers(1, most_groups))
    shape = (2, heads, tokens, draw(st.sampled_from(dims)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    bits = torch.randint(0, 1 << 16, shape, generator=generator)
    if draw(st.integers(0, 3)):
        width, mantissa = draw(st.integers(1, 12)), MANTISSA[dtype]
        largest = (1 << 15 - mantissa) - 1
        middle = torch.randint(0, largest + 1, (2, heads, 1, shape[3]), generator=generator)
        exponent = (middle - torch.randint(0, width, shape, generator=generator)).clamp(0, largest)
        bits = bits & ~(largest << mantissa) | exponent << mantissa
    return from_bits(bits, dtype)


def with_misses(form, misses, escapes):
    """A tile of ones, but for so many misses, of which some are escapes."""
    flat = torch.ones(form.values, dtype=form.dtype)
    places = torch.arange(form.values).view(-1, BLOCK)[:, : BLOCK // 3].T.flatten()  # few in each block
    flat[places[: misses - escapes]] = 0.125
    flat[places[misses - escapes : misses]] = 2.0**-20
    return flat.view(2, form.kv_heads, form.head_dim, form.tile_tokens).transpose(2, 3).contiguous()


def around_a_full_room(form):
    """Tiles that fill the room exactly, and by a byte too much."""
    found = {}
    for misses in range(8 * (form.room - 502) // 3, 8 * (form.room - 496) // 3):
        size = sum((3 * part + 7) // 8 for part in halves(form, misses)) + 500
        found.setdefault(size - form.room, with_misses(form, misses, 500))
    return found[0], found[1]


def halves(form, misses):
    """Misses in the region of the keys, and in that of the values, of a tile of one head and one block."""
    whole, rest = divmod(misses, form.values // BLOCK)
    keys = whole * form.head_dim + min(rest, form.head_dim)
    return keys, misses - keys
