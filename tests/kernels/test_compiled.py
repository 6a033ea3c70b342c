"""The compiled loops against their eager twins."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_triforce.kernels import compiled, cpu, reference, reference_codec
from offload_triforce.kernels.types import ChunkSelection, CodedChunks
from tests.kernels.test_cpu import assert_same_choice, draw_choice

# Of scores: the eager twin rounds mean keys to the keys' type.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("heads", "rows", "chunks", "chunk", "dim"), [(1, 1, 1, 1, 1), (3, 39, 17, 8, 64), (2, 5, 9, 3, 7)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_chunk_scores(dtype, heads, rows, chunks, chunk, dim, masked):
    chance = torch.Generator().manual_seed(dim)
    packed = torch.randn(heads, rows, dim, generator=chance).to(dtype)
    key = torch.randn(heads, chunks * chunk + 5, dim, generator=chance).to(dtype)[:, 5:]  # strided
    baseline, held = torch.randn(heads, rows, generator=chance), None
    if masked:
        held = torch.rand(heads, chunks + 3, generator=chance)[:, :chunks] < 0.3
    expected = reference.chunk_scores(packed, key, chunk, 0.125, baseline, held)
    found = compiled.chunk_scores(packed, key, chunk, 0.125, baseline, held)
    torch.testing.assert_close(found, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_is_read_as_what_it_is(dtype):
    """As chunks of one key of one channel: the score is the number. Infinities and NaN come out as such."""
    key = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)[None, :, None]
    expected = key.float()[..., 0]
    found = compiled.chunk_scores(torch.ones(1, 1, 1, dtype=dtype), key, 1, 1.0, torch.zeros(1, 1))
    finite = expected.isfinite()
    assert torch.equal(found[finite], expected[finite])
    assert not found[~finite & ~(expected == -torch.inf)].isfinite().any()


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 10**6))
@settings(deadline=None, max_examples=100)
def test_selection(slots, count, seed):
    """Few distinct scores, so that ties are common; empty slots; chunks that are not on offer."""
    held, chunks, present, offered = draw_choice(slots, count, seed)
    choices = [ChunkSelection(held.clone(), chunks.clone(), present.clone()) for _ in range(2)]
    functions = (reference.select_chunks, compiled.select_chunks)
    sources = [f(choice, offered, 20) for f, choice in zip(functions, choices, strict=True)]
    assert torch.equal(*sources)
    assert_same_choice(*choices)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("heads", "slots", "chunk", "dim"), [(1, 1, 1, 2), (3, 11, 8, 64), (2, 5, 3, 10)])
def test_unpacking(bits, heads, slots, chunk, dim):
    chance = torch.Generator().manual_seed(dim)

    def codes(*shape):
        return torch.randint(0, 256, shape, generator=chance, dtype=torch.uint8)

    rows = heads, slots
    coded = CodedChunks(
        codes(*rows, chunk, dim * bits // 8),
        codes(*rows, chunk, dim * bits // 8),
        codes(*rows, dim),
        codes(*rows, dim),
        torch.randn(*rows, chunk, generator=chance).half(),
        torch.rand(*rows, chunk, generator=chance).half(),
        torch.randn(heads, dim, generator=chance),
        torch.rand(heads, dim, generator=chance) + 1,
    )
    for filled in {1, slots}:
        for found, expected in zip(
            compiled.decode_chunks(coded, filled), reference_codec.decode_chunks(coded, filled), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_torch_serves_where_numba_is_missing_or_forbidden(monkeypatch):
    assert cpu.loops("compiled") is compiled
    monkeypatch.setenv(cpu.CHOICE, "torch")
    assert cpu.loops("compiled") is None
    monkeypatch.delenv(cpu.CHOICE)
    monkeypatch.setattr(cpu, "_import_loops", lambda name: None)
    key = torch.randn(2, 16, 4).bfloat16()
    args = torch.randn(2, 3, 4).bfloat16(), key, 4, 0.5, torch.zeros(2, 3)
    assert torch.equal(cpu.chunk_scores(*args), reference.chunk_scores(*args))
