"""Packed chunks: what the codec loses, and the Triton kernels against their eager twins."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload_triforce.kernels import ops, reference, reference_codec
from offload_triforce.kernels.reference_codec import decode_keys, decode_values, pack, unpack
from offload_triforce.kernels.types import AttentionParams, ChunkSelection, CodedChunks, TreeMask
from tests.usual import sampled

# Tolerances of attention in each dtype: both twins round keys, values and weights to it.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def draw(device, *shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def new_coded(device, heads, slots, chunk, dim, bits, fill=0, reach=6.0):
    """One layer of three: its parts lie among others'."""

    def part(*shape, dtype=torch.uint8):
        whole = torch.full((3, heads, slots, *shape), fill, dtype=dtype, device=device)
        return whole[1]

    row = dim * bits // 8
    return CodedChunks(
        part(chunk, row),
        part(chunk, row),
        part(dim),
        part(dim),
        part(chunk, dtype=torch.float16),
        part(chunk, dtype=torch.float16),
        torch.full((heads, dim), -reach, device=device) + 0.1 * draw(device, heads, dim, seed=5),
        torch.full((heads, dim), 2 * reach, device=device) + 0.1 * draw(device, heads, dim, seed=6),
    )


def filled(device, heads, slots, chunk, dim, bits, dtype=torch.float32):
    """All slots taken, in another order than in the tile; and what is in there, [2, K, slots*chunk, D]."""
    coded = new_coded(device, heads, slots, chunk, dim, bits)
    kv = draw(device, 2, heads, slots * chunk, dim, dtype=dtype)
    order = torch.stack([torch.randperm(slots, generator=torch.Generator().manual_seed(h)) for h in range(heads)])
    reference_codec.encode_chunks(order.to(device), kv, coded)
    chunks = kv.unflatten(2, (slots, chunk))
    return coded, torch.stack([chunks[:, h, order[h]] for h in range(heads)], dim=1).flatten(2, 3)


# --- what the codec loses


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("chunk", "dim"), [(8, 64), (4, 128), (7, 80), (1, 16)])
def test_error_is_half_a_step(bits, chunk, dim):
    """Of the range of the chunk's channel (keys; a little more for the range's own rounding), or of the token."""
    coded, (key, value) = filled("cpu", 2, 5, chunk, dim, bits)
    levels = 2**bits - 1
    ranges = key.unflatten(1, (5, chunk)).amax(2, keepdim=True) - key.unflatten(1, (5, chunk)).amin(2, keepdim=True)
    widest = (ranges + 2 * coded.spread[:, None, None] / 255).expand(2, 5, chunk, dim).flatten(1, 2)
    assert bool(((decode_keys(coded, 5) - key).abs() <= 0.51 * widest / levels).all())
    ranges = value.amax(2, keepdim=True) - value.amin(2, keepdim=True)
    assert bool(((decode_values(coded, 5) - value).abs() <= 0.51 * ranges / levels + 2e-3).all())


def test_neighbours_alike_cost_little():
    """The point of a range per channel and chunk: channels far apart, tokens close together."""
    coded = new_coded("cpu", 1, 1, 8, 64, 4, reach=40.0)
    key = 30 * draw("cpu", 1, 1, 64).clamp(-1, 1) + 0.1 * draw("cpu", 1, 8, 64, seed=1)
    reference_codec.encode_chunks(torch.zeros(1, 1, dtype=torch.long), torch.stack([key, key]), coded)
    assert float((decode_keys(coded, 1) - key).abs().max()) < 0.1
    assert float((decode_values(coded, 1) - key).abs().max()) > 1.0


def test_outside_of_the_fixed_range_nothing_breaks():
    coded = new_coded("cpu", 1, 2, 4, 16, 4, reach=0.5)
    kv = 100 * draw("cpu", 2, 1, 8, 16)
    reference_codec.encode_chunks(torch.tensor([[1, 0]]), kv, coded)
    assert bool(decode_keys(coded, 2).isfinite().all())
    assert float(decode_keys(coded, 2).abs().max()) < 2.0


def test_constant_chunks_are_kept():
    coded = new_coded("cpu", 1, 1, 4, 16, 4)
    kv = torch.full((2, 1, 4, 16), 0.25)
    reference_codec.encode_chunks(torch.zeros(1, 1, dtype=torch.long), kv, coded)
    assert float((decode_keys(coded, 1) - 0.25).abs().max()) < 12.4 / 255
    assert torch.equal(decode_values(coded, 1), kv[1])


def test_only_what_enters_is_written():
    coded = new_coded("cpu", 2, 3, 4, 16, 4, fill=9)
    reference_codec.encode_chunks(torch.tensor([[-1, 1, -1], [0, -1, -1]]), draw("cpu", 2, 2, 8, 16), coded)
    for part in coded[:6]:
        same = (part == 9).flatten(2).all(2)
        assert same.tolist() == [[True, False, True], [False, True, True]]


@given(st.integers(1, 12), st.sampled_from([4, 8]), st.integers(0, 1000))
def test_packing_loses_nothing(half, bits, seed):
    codes = torch.randint(0, 2**bits, (3, 2 * half), generator=torch.Generator().manual_seed(seed)).byte()
    packed = pack(codes, bits)
    assert packed.shape == (3, 2 * half * bits // 8)
    assert torch.equal(unpack(packed, bits), codes.float())


# --- kernels


kv_codec = pytest.importorskip("offload_triforce.kernels.kv_codec", reason="needs Triton")
packed_attention = pytest.importorskip("offload_triforce.kernels.packed_attention", reason="needs Triton")
chunk_selection = pytest.importorskip("offload_triforce.kernels.chunk_selection", reason="needs Triton")
verify_attention = pytest.importorskip("offload_triforce.kernels.verify_attention", reason="needs Triton")
states = pytest.importorskip("offload_triforce.kernels.attention_state", reason="needs Triton")


SHAPES = [  # heads, slots, chunk, dim, bits
    (2, 9, 8, 64, 4),
    (1, 3, 7, 80, 4),
    (3, 5, 4, 128, 8),
    (2, 1, 16, 96, 8),
    (1, 4, 1, 32, 4),
    (1, 2, 33, 256, 4),
    (1, 9, 8, 192, 4),
]


@pytest.mark.parametrize(
    ("dtype", "heads", "slots", "chunk", "dim", "bits"), sampled([*TOLERANCE], SHAPES, share=2), ids=str
)
def test_what_enters_is_packed(device, heads, slots, chunk, dim, bits, dtype):
    """Codes may differ by one where a number lies in the middle of two; there are few of those."""
    count = slots + 3
    kv = torch.full((2, heads, count * chunk + 5, dim), math.nan, dtype=dtype, device=device)[:, :, 3:-2]
    kv.copy_(draw(device, *kv.shape, dtype=dtype))
    offered = draw(device, heads, count, seed=1)
    offered = offered.masked_fill(offered < -0.5, -math.inf)  # not all slots are filled
    coded = []
    for backend in (chunk_selection, reference):
        coded.append(new_coded(device, heads, slots, chunk, dim, bits, fill=3))
        empty = torch.full((heads, slots), -math.inf, device=device), torch.full((heads, slots), -1, device=device)
        held = torch.zeros(heads, count + 1, dtype=torch.bool, device=device)
        backend.take_chunks(ChunkSelection(*empty, held), offered, 0, kv, coded[-1])
    actual, expected = coded
    for one, other in zip(actual[2:6], expected[2:6], strict=True):
        assert float((one != other).float().mean()) < 0.02
        torch.testing.assert_close(one.float(), other.float(), atol=1.0, rtol=1e-3)
    for one, other in zip(actual[:2], expected[:2], strict=True):
        apart = (unpack(one, bits) - unpack(other, bits)).abs()
        assert float(apart.max()) <= (3 if bits == 8 else 1)
        assert float((apart > 0).float().mean()) < 0.02


@pytest.mark.parametrize(
    ("dtype", "heads", "slots", "chunk", "dim", "bits"), sampled([*TOLERANCE], SHAPES, share=2), ids=str
)
def test_decode_keys(device, heads, slots, chunk, dim, bits, dtype):
    coded, _ = filled(device, heads, slots, chunk, dim, bits)
    for count in {slots, max(1, slots // 2)}:
        actual = kv_codec.decode_keys(coded, count, dtype)
        assert actual.dtype == dtype
        expected = decode_keys(coded, count).to(dtype)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=TOLERANCE[dtype])


def attention_of(eager, update, packed, near, params):
    """Attention over keys that come as they are, before packed ones: output [K, R, D] and log-sum-exp."""
    if eager:
        functions, state = reference, reference.attention_start(packed)
    else:
        functions, state = states, states.attention_start(states.state_buffers((), packed), packed)
    if near is not None:
        attend = (reference if eager else verify_attention).attention_update
        state = attend(state, packed, near[0], near[1], params)
    state = update(state)
    return functions.attention_finish(state, packed.shape[0], torch.float32), functions.attention_logsumexp(state)


@pytest.mark.parametrize(
    ("dtype", "heads", "slots", "chunk", "dim", "bits", "rows"),
    sampled([*TOLERANCE], SHAPES, [1, 21], share=3),
    ids=str,
)
def test_attention(device, heads, slots, chunk, dim, bits, dtype, rows):
    coded, _ = filled(device, heads, slots, chunk, dim, bits)
    packed = draw(device, heads, rows, dim, dtype=dtype, seed=2)
    near = draw(device, 2, heads, 11, dim, dtype=dtype, seed=3) if rows > 1 else None
    params = AttentionParams(dim**-0.5, softcap=5.0 if chunk == 7 else None)
    tokens = torch.tensor([slots * chunk - slots * chunk // 3], device=device)
    for count, length in ((slots, None), (max(1, slots - 1), None), (None, tokens)):

        def eager(state, count=count, length=length):
            key, value = (
                x.to(dtype) for x in (decode_keys(coded, count or slots), decode_values(coded, count or slots))
            )
            tree_mask = None
            if length is not None:
                tree_mask = TreeMask(torch.ones(1, 1, dtype=torch.bool, device=device), length=length)
            return reference.attention_update(state, packed, key, value, params, tree_mask)

        def triton(state, count=count, length=length):
            return packed_attention.attention_update(state, packed, coded, params, count, length)

        actual = attention_of(False, triton, packed, near, params)
        expected = attention_of(True, eager, packed, near, params)
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("rows", "dim", "bits"), [(40, 128, 4), (130, 128, 4), (70, 192, 4), (40, 80, 4), (40, 64, 8), (20, 512, 4)]
)
def test_blocks_of_every_size(device, rows, dim, bits):
    """As the first update and as a later one."""
    coded, _ = filled(device, 1, 11, 8, dim, bits)
    packed = draw(device, 1, rows, dim, dtype=torch.float16, seed=2)
    params = AttentionParams(dim**-0.5)
    state = states.attention_start(states.state_buffers((), packed), packed)
    for slots in (11, 7):
        state = packed_attention.attention_update(state, packed, coded, params, slots)
    key, value = (torch.cat([f(coded, 11), f(coded, 7)], 1) for f in (decode_keys, decode_values))
    expected = (packed.float() @ key.mT * params.scaling).softmax(-1) @ value
    actual = states.attention_finish(state, 1, torch.float32)
    torch.testing.assert_close(actual, expected, atol=3e-3, rtol=3e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_what_channels_have_in_common_costs_no_precision(device, dtype):
    """Keys far from zero, large queries: a bfloat16 of 100 is a quarter off, a small number is not."""
    coded, _ = filled(device, 1, 9, 8, 64, 4)
    coded.floor.add_(100 * draw(device, 64, seed=3).sign())
    packed = (10 * draw(device, 1, 5, 64, seed=2)).to(dtype)
    state = states.attention_start(states.state_buffers((), packed), packed)
    state = packed_attention.attention_update(state, packed, coded, AttentionParams(0.03), 9)
    scores = packed.double() @ decode_keys(coded, 9).double().mT * 0.03
    actual = states.attention_logsumexp(state).double()
    torch.testing.assert_close(actual, scores.logsumexp(-1), atol=3e-3, rtol=1e-6)
    rounded = packed.double() @ decode_keys(coded, 9).to(dtype).double().mT * 0.03
    assert dtype == torch.float16 or float((rounded - scores).abs().max()) > 0.1, "that is not as good"


@pytest.mark.parametrize("slots", [0, 5])
def test_nothing_there_yet(device, slots):
    """In a step of fixed work the device may say that no chunk has been chosen."""
    coded, _ = filled(device, 2, 5, 4, 32, 4)
    packed, near = draw(device, 2, 3, 32), draw(device, 2, 2, 6, 32, seed=1)
    params, tokens = AttentionParams(0.2), torch.tensor([slots * 4], device=device)
    state = states.attention_start(states.state_buffers((), packed), packed)
    state = packed_attention.attention_update(state, packed, coded, params, tokens=tokens)
    state = verify_attention.attention_update(state, packed, near[0], near[1], params)
    key = torch.cat([decode_keys(coded, 5)[:, : slots * 4], near[0]], 1)
    value = torch.cat([decode_values(coded, 5)[:, : slots * 4], near[1]], 1)
    expected = torch.softmax(packed @ key.mT * 0.2, -1) @ value
    actual = states.attention_finish(state, 2, torch.float32)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_offsets_past_two_to_the_31(device, arena):
    """Heads far apart: what is computed in 32 bits wraps around."""
    heads, slots, chunk, dim = 2, 3, 4, 32
    near, _ = filled(device, heads, slots, chunk, dim, 4)
    apart = 3 << 30
    far = CodedChunks(
        *(
            arena(part, (apart // part.itemsize * 2, *part.stride()[1:]))
            for part in (near.key_codes, near.value_codes, near.key_low, near.key_step, near.value_low, near.value_step)
        ),
        near.floor,
        near.spread,
    )
    packed = draw(device, heads, 5, dim)
    outputs = []
    for coded in (near, far):
        state = states.attention_start(states.state_buffers((), packed), packed)
        state = packed_attention.attention_update(state, packed, coded, AttentionParams(0.2), slots)
        outputs.append(states.attention_finish(state, heads, torch.float32))
    assert torch.equal(*outputs)
    assert torch.equal(
        kv_codec.decode_keys(far, slots, torch.float32), kv_codec.decode_keys(near, slots, torch.float32)
    )


@given(
    heads=st.integers(1, 3), slots=st.integers(1, 12), chunk=st.integers(1, 9), half=st.sampled_from([8, 16, 24, 40]),
    rows=st.integers(1, 40), bits=st.sampled_from([4, 8]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape(device, heads, slots, chunk, half, rows, bits, seed):
    coded, _ = filled(device, heads, slots, chunk, 2 * half, bits)
    packed = draw(device, heads, rows, 2 * half, seed=seed)
    state = states.attention_start(states.state_buffers((), packed), packed)
    state = packed_attention.attention_update(state, packed, coded, AttentionParams(0.3), slots)
    actual = states.attention_finish(state, heads, torch.float32)
    expected = torch.softmax(packed @ decode_keys(coded, slots).mT * 0.3, -1) @ decode_values(coded, slots)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dim", [32, 20])
def test_operations_take_the_kernels(monkeypatch, device, dim):
    """``ops`` hands over to Triton where it serves, and to the eager twin elsewhere: the same numbers."""
    outputs = []
    coded, _ = filled(device, 2, 6, 4, dim, 4)
    query = draw(device, 6, 3, dim)
    for wanted in ("triton", "torch"):
        monkeypatch.setenv("OFFLOAD_TRIFORCE_KERNELS", wanted)
        attention = ops.RunningAttention()
        attention.start(query, 2, AttentionParams(0.2))
        attention.update_coded(coded, 6)
        outputs.append((attention.finish(), ops.decode_keys(coded, 6, torch.float32)))
        fresh = new_coded(device, 2, 6, 4, dim, 4)
        ops.put_chunks(torch.tensor([[0, -1, 1, 2, 3, 4]] * 2, device=device), draw(device, 2, 2, 20, dim), fresh)
        outputs[-1] += (decode_keys(fresh, 6),)
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
