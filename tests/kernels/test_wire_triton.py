"""Coding of tiles in Triton: the eager twins' bytes, and every bit back. Few programs: the interpreter is slow."""

import pytest
import torch
from hypothesis import given, settings

from offload_triforce.kernels import reference_wire
from offload_triforce.kernels.wire_format import BLOCK, WireFormat
from tests.kernels.wire_tiles import (
    HALVES,
    around_a_full_room,
    check_identity,
    encoded,
    every_value,
    form_of,
    from_bits,
    same_bits,
    tiles,
    to_the_last_byte,
)

pytest.importorskip("triton")

from offload_triforce.kernels import wire_codec

BOTH = (reference_wire, wire_codec)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", HALVES)
def test_every_value_comes_back(device, dtype):
    check_identity(every_value(dtype, 512).to(device), BOTH, decodes=True)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_block_that_is_short_and_channels_that_are_no_power_of_two(device, dtype):
    check_identity(draw(2, 1, 72, 24).to(dtype).to(device), BOTH)


@pytest.mark.parametrize("dtype", HALVES)
def test_extensions_that_end_in_the_last_byte_of_the_room(device, dtype):
    check_identity(to_the_last_byte(dtype).to(device), BOTH, decodes=True)


@settings(max_examples=5, deadline=None)
@given(kv=tiles(most_heads=1, most_groups=9, dims=(1, 8, 24)))
def test_any_bits(device, kv):
    check_identity(kv.to(device), BOTH)


def test_rooms_that_are_full_and_more(device):
    full, over = around_a_full_room(WireFormat(1, BLOCK, 64, torch.bfloat16))
    check_identity(full.to(device), BOTH, decodes=True)
    check_identity(over.to(device), BOTH, decodes=False)
    bits = torch.randint(0, 1 << 16, (2, 1, 64, 16), generator=torch.Generator().manual_seed(2))
    check_identity(from_bits(bits, torch.bfloat16).to(device), BOTH, decodes=False)


def test_strided_tiles_in_places_used_before(device):
    buffer = draw(2, 1, 100, 16).bfloat16().to(device)
    kv = buffer[:, :, 20:92]
    form = form_of(kv)
    coded, target = torch.full((form.bytes,), 255, dtype=torch.uint8, device=device), torch.zeros_like(buffer)
    wire_codec.wire_encode(kv, coded, form)
    assert torch.equal(coded[: form.begins[-1]][16:], encoded(reference_wire, kv)[: form.begins[-1]][16:])
    wire_codec.wire_decode(coded, target[:, :, 4:76], form)
    assert same_bits(target[:, :, 4:76], kv)
    assert not target[:, :, :4].any()
    assert not target[:, :, 76:].any()


def test_tiles_that_follow_each_other_in_other_buffers(device):
    """The second one goes by the bound launch: nothing of the first one's memory may be in it."""
    steps = torch.arange(72)[:, None] % torch.tensor([1, 2, 12, 1, 2, 3, 2, 1])
    first = (2.0**-steps).expand(2, 1, 72, 8).bfloat16().contiguous().to(device)
    second = first.flip(0, 2, 3).contiguous()
    second[0] = 1
    for kv in (first, second):
        check_identity(kv, BOTH, decodes=True)


def test_offsets_do_not_wrap(arena):
    """Heads and parts of a tile may lie further apart than 32 bits count."""
    values = draw(2, 2, 64, 8).bfloat16()
    kv = arena(values, (3 << 31, 3 << 30, 8, 1))
    coded = encoded(wire_codec, kv)
    assert torch.equal(coded, encoded(reference_wire, values.to(coded.device)))
    target = arena(torch.zeros_like(values), (3 << 31, 3 << 30, 8, 1))
    wire_codec.wire_decode(coded, target, form_of(kv))
    assert same_bits(target, values.to(coded.device))


def test_rows_must_be_contiguous(device):
    kv = draw(2, 1, 16, 64).bfloat16().to(device).transpose(2, 3)
    with pytest.raises(ValueError, match="last dimension"):
        encoded(wire_codec, kv)
