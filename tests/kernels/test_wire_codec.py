"""Coding of tiles is the identity on bits, and all three implementations write the same bytes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_triforce.kernels import ops, reference_wire
from offload_triforce.kernels.wire_format import BLOCK, WireFormat, parts

numba_wire = pytest.importorskip("offload_triforce.kernels.cpu_wire")
HALVES = (torch.bfloat16, torch.float16)
CPU = (reference_wire, numba_wire)


def encoded(codec, kv, form):
    coded = torch.zeros(form.bytes, dtype=torch.uint8)
    codec.wire_encode(kv, coded, form)
    return coded


def missing(coded):
    return coded[:4].view(torch.int32).item()


def same_bits(one, other):
    return torch.equal(one.contiguous().view(torch.int16), other.contiguous().view(torch.int16))


def check_identity(kv, codecs=CPU, decodes=True):
    """All write the same; if it ``decodes`` (None: where it does), all of them find every bit again."""
    form = WireFormat(kv.shape[1], kv.shape[2], kv.shape[3], kv.dtype)
    coded = encoded(codecs[0], kv, form)
    for codec in codecs[1:]:
        assert torch.equal(encoded(codec, kv, form), coded)
    if decodes is not None:
        assert (missing(coded) == 0) == decodes
    for codec in codecs if missing(coded) == 0 else ():
        again = torch.full_like(kv, 7)
        codec.wire_decode(coded, again, form)
        assert same_bits(again, kv)
    return coded


def from_bits(bits, dtype):
    return torch.as_tensor(bits).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_value_comes_back(dtype):
    """All 65,536 bit patterns: next to their likes, and alone among the largest exponents."""
    every = from_bits(torch.arange(1 << 16), dtype)
    check_identity(every.view(2, 4, 64, 128).transpose(2, 3))
    alone = from_bits(torch.full((1 << 16, 16), 0x7FFF), dtype)
    alone[:, 5] = every
    check_identity(alone.view(2, 1, 128, 4096).transpose(2, 3))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tokens", [8, 56, 64, 72, 136, 192])
@pytest.mark.parametrize("dim", [1, 16, 80])
def test_odd_sizes(dtype, tokens, dim):
    check_identity(torch.randn(2, 3, tokens, dim, generator=torch.Generator().manual_seed(1)).to(dtype), decodes=None)
    check_identity(torch.ones(2, 1, tokens, dim, dtype=dtype))


@st.composite
def tiles(draw):
    """Tiles of a few exponents each, and of any bits at all."""
    dtype = draw(st.sampled_from(HALVES))
    heads, tokens, dim = draw(st.integers(1, 3)), 8 * draw(st.integers(1, 20)), draw(st.sampled_from([1, 8, 24, 64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    shape = (2, heads, tokens, dim)
    bits = torch.randint(0, 1 << 16, shape, generator=generator)
    if draw(st.booleans()):  # exponents within a range around one of each channel
        width, mantissa = draw(st.integers(1, 16)), torch.finfo(dtype).bits - 1 - (8 if dtype == torch.bfloat16 else 5)
        largest = (1 << 15 - mantissa) - 1
        middle = torch.randint(0, largest + 1, (2, heads, 1, dim), generator=generator)
        exponent = (middle - torch.randint(0, width, shape, generator=generator)).clamp(0, largest)
        bits = bits & ~(largest << mantissa) | exponent << mantissa
    return from_bits(bits, dtype)


@settings(max_examples=60, deadline=None)
@given(tiles())
def test_any_bits(kv):
    check_identity(kv, decodes=None)


def test_a_tile_without_order_does_not_fit():
    bits = torch.randint(0, 1 << 16, (2, 2, 128, 32), generator=torch.Generator().manual_seed(2))
    coded = check_identity(from_bits(bits, torch.bfloat16), decodes=False)
    form = WireFormat(2, 128, 32, torch.bfloat16)
    part = parts(coded, form)
    assert missing(coded) == part.sizes.sum() - form.room
    assert part.header[1] == form.begins[-1] + part.sizes.sum()


def with_misses(form, misses, escapes):
    """A tile of ones, with so many values of half that exponent and so many misses, of which some are escapes."""
    kv = torch.ones(2, form.kv_heads, form.tile_tokens, form.head_dim, dtype=form.dtype)
    flat = kv.transpose(2, 3).reshape(-1)  # so that the few of a block stay few
    places = torch.arange(flat.numel()).view(-1, BLOCK)[:, : BLOCK // 3].T.flatten()
    flat[places[: misses - escapes]] = 0.125
    flat[places[misses - escapes : misses]] = 2.0**-20
    return flat.view(2, form.kv_heads, form.head_dim, form.tile_tokens).transpose(2, 3).contiguous()


@pytest.mark.parametrize("dtype", HALVES)
def test_a_room_that_is_exactly_full(dtype):
    """One byte more does not fit."""
    form = WireFormat(1, BLOCK, 64, dtype)
    seen = set()
    for misses in range(8 * (form.room - 502) // 3, 8 * (form.room - 496) // 3):
        kv = with_misses(form, misses, 500)
        used = parts(encoded(numba_wire, kv, form), form).sizes.sum().item()
        if used - form.room in (0, 1) and used not in seen:
            seen.add(used)
            assert missing(check_identity(kv, decodes=used == form.room)) == used - form.room
    assert seen == {form.room, form.room + 1}


def test_used_bytes_suffice():
    """What lies behind the bytes in use is not needed."""
    kv = torch.randn(2, 2, 128, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    form = WireFormat(2, 128, 64, torch.bfloat16)
    for codec in CPU:
        coded, again = encoded(codec, kv, form), torch.empty_like(kv)
        coded[parts(coded, form).header[1] :] = 255
        codec.wire_decode(coded, again, form)
        assert same_bits(again, kv)


def test_strided_tiles():
    """A tile may be a part of a longer buffer, on either side."""
    form = WireFormat(2, 64, 32, torch.bfloat16)
    buffer = torch.randn(2, 2, 200, 32, generator=torch.Generator().manual_seed(4)).bfloat16()
    kv = buffer[:, :, 100:164]
    for codec in CPU:
        coded = encoded(codec, kv, form)
        assert torch.equal(coded, encoded(codec, kv.contiguous(), form))
        target = torch.zeros_like(buffer)
        codec.wire_decode(coded, target[:, :, 8:72], form)
        assert same_bits(target[:, :, 8:72], kv)
        assert not target[:, :, :8].any()
        assert not target[:, :, 72:].any()


def test_what_is_behind_a_tile_stays():
    form = WireFormat(1, 72, 24, torch.float16)
    kv = torch.randn(2, 1, 72, 24, generator=torch.Generator().manual_seed(5)).half()
    for codec in CPU:
        coded = torch.full((form.bytes + 64,), 77, dtype=torch.uint8)
        codec.wire_encode(kv, coded[: form.bytes], form)
        assert (coded[form.bytes :] == 77).all()


def test_threads_share_a_tile(monkeypatch):
    kv = torch.randn(2, 2, 520, 64, generator=torch.Generator().manual_seed(6)).bfloat16()
    monkeypatch.setattr(numba_wire, "LEAST_SHARE", 1 << 10)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    check_identity(kv)


def test_which_way(monkeypatch):
    kv = torch.zeros(2, 1, 8, 8, dtype=torch.bfloat16)
    monkeypatch.delenv(ops.CHOICE, raising=False)
    assert ops._wire_functions(kv) is numba_wire
    monkeypatch.setenv(ops.CHOICE, "torch")
    assert ops._wire_functions(kv) is reference_wire
    monkeypatch.delenv(ops.CHOICE)
    monkeypatch.setattr(ops, "_numba_wire", lambda: None)
    assert ops._wire_functions(kv) is reference_wire


@pytest.mark.parametrize(("tokens", "dtype"), [(12, torch.bfloat16), (0, torch.bfloat16), (64, torch.float32)])
def test_what_cannot_be_coded(tokens, dtype):
    assert not WireFormat.serves(tokens, dtype)
    with pytest.raises(ValueError, match="cannot be coded"):
        WireFormat(1, tokens, 8, dtype)


def test_the_rate():
    form = WireFormat(8, 4096, 128, torch.bfloat16)
    assert form.raw_bytes == 2 * form.values == 16 << 20
    assert form.bytes % 256 == 0
    assert form.ratio >= 1.45
