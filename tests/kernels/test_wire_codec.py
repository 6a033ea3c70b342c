"""Coding of tiles is the identity on bits, and numba writes the same bytes as the eager twins."""

import pytest
import torch
from hypothesis import given, settings

from offload_triforce.kernels import cpu, ops, reference_wire
from offload_triforce.kernels.wire_format import BLOCK, MANTISSA, WireFormat, parts
from tests.kernels.wire_tiles import (
    HALVES,
    around_a_full_room,
    check_identity,
    encoded,
    every_value,
    form_of,
    from_bits,
    missing,
    same_bits,
    tiles,
    to_the_last_byte,
)

numba_wire = pytest.importorskip("offload_triforce.kernels.cpu_wire")
CPU = (reference_wire, numba_wire)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", HALVES)
def test_every_value_comes_back(dtype):
    """Next to its likes, and alone among the largest exponents."""
    every = every_value(dtype, 64)
    check_identity(every, CPU, decodes=True)
    alone = from_bits(torch.full((1 << 16, 16), 0x7FFF), dtype)
    alone[:, 5] = every.flatten()
    check_identity(alone.view(2, 1, 128, 4096).transpose(2, 3), CPU, decodes=True)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tokens", [8, 56, 64, 72, 136, 192])
@pytest.mark.parametrize("dim", [1, 16, 80])
def test_odd_sizes(dtype, tokens, dim):
    check_identity(draw(2, 3, tokens, dim).to(dtype), CPU)
    check_identity(torch.ones(2, 1, tokens, dim, dtype=dtype), CPU, decodes=True)


@settings(max_examples=200, deadline=None)
@given(tiles())
def test_any_bits(kv):
    check_identity(kv, CPU)


@pytest.mark.parametrize("dtype", HALVES)
def test_larger_numbers_among_the_smallest(dtype):
    """A miss whose code would take the exponent below 0 leaves its sign as it is."""
    bits = torch.zeros(2, 1, 64, 64, dtype=torch.int32)  # whose level is 0
    bits[:, :, 3, :2] = torch.tensor([3, 4]) << MANTISSA[dtype]
    bits[:, :, 5, :2] = bits[:, :, 3, :2] | 0x8000
    check_identity(from_bits(bits, dtype), CPU, decodes=True)


@pytest.mark.parametrize("dtype", HALVES)
def test_extensions_that_end_in_the_last_byte_of_the_room(dtype):
    """Four of 3 bits, in a room of 2 bytes."""
    coded = check_identity(to_the_last_byte(dtype), CPU, decodes=True)
    form = WireFormat(1, 8, 1, dtype)
    assert parts(coded, form).sizes.sum() == form.room == 2


def test_a_tile_without_order_does_not_fit():
    bits = torch.randint(0, 1 << 16, (2, 2, 128, 32), generator=torch.Generator().manual_seed(2))
    kv = from_bits(bits, torch.bfloat16)
    coded, form = check_identity(kv, CPU, decodes=False), form_of(kv)
    used = parts(coded, form).sizes.sum()
    assert missing(coded) == used - form.room
    assert parts(coded, form).header[1] == form.begins[-1] + used


@pytest.mark.parametrize("dtype", HALVES)
def test_a_room_that_is_exactly_full(dtype):
    """One byte more does not fit."""
    full, over = around_a_full_room(WireFormat(1, BLOCK, 64, dtype))
    assert missing(check_identity(full, CPU, decodes=True)) == 0
    assert missing(check_identity(over, CPU, decodes=False)) == 1


def test_used_bytes_suffice():
    """What lies behind the bytes in use is not needed."""
    kv = draw(2, 2, 128, 64, seed=3).bfloat16()
    for codec in CPU:
        coded, again = encoded(codec, kv), torch.empty_like(kv)
        used = parts(coded, form_of(kv)).header[1]
        assert used < len(coded)
        coded[used:] = 255
        codec.wire_decode(coded, again, form_of(kv))
        assert same_bits(again, kv)


def test_strided_tiles():
    """A tile may be a part of a longer buffer, on either side."""
    buffer = draw(2, 2, 200, 32, seed=4).bfloat16()
    kv = buffer[:, :, 100:164]
    for codec in CPU:
        coded = encoded(codec, kv)
        assert torch.equal(coded, encoded(codec, kv.contiguous()))
        target = torch.zeros_like(buffer)
        codec.wire_decode(coded, target[:, :, 8:72], form_of(kv))
        assert same_bits(target[:, :, 8:72], kv)
        assert not target[:, :, :8].any()
        assert not target[:, :, 72:].any()


@pytest.mark.parametrize("dtype", HALVES)
def test_a_dirty_place_makes_no_difference(dtype):
    """A place in memory is written to again and again; and nothing behind it is."""
    kv = draw(2, 1, 72, 24, seed=5).to(dtype)
    form, clean = form_of(kv), None
    for codec in CPU:
        for filler in (0, 255):
            coded, again = torch.full((form.bytes + 64,), filler, dtype=torch.uint8), torch.empty_like(kv)
            codec.wire_encode(kv, coded[: form.bytes], form)
            assert (coded[form.bytes :] == filler).all()
            used = parts(coded, form).room[: parts(coded, form).sizes.sum()]
            clean = used.clone() if clean is None else clean
            assert torch.equal(used, clean)
            codec.wire_decode(coded[: form.bytes], again, form)
            assert same_bits(again, kv)


def test_threads_share_a_tile(monkeypatch):
    monkeypatch.setattr(numba_wire, "LEAST_SHARE", 1 << 10)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    check_identity(draw(2, 2, 520, 64, seed=6).bfloat16(), CPU, decodes=True)


def test_which_way(monkeypatch):
    kv = torch.zeros(2, 1, 8, 8, dtype=torch.bfloat16)
    monkeypatch.delenv(ops.CHOICE, raising=False)
    assert ops._wire_functions(kv) is numba_wire
    monkeypatch.setenv(ops.CHOICE, "torch")
    assert ops._wire_functions(kv) is reference_wire
    monkeypatch.delenv(ops.CHOICE)
    monkeypatch.setattr(cpu, "_import_loops", lambda name: None)
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
    assert check_identity(draw(2, 2, 256, 128).bfloat16(), CPU, decodes=True).numel() * 1.45 < 2 * 2 * 2 * 256 * 128
