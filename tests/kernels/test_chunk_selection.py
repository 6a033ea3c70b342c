"""The Triton kernels that score, select and gather chunks against their eager twins."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload_triforce.kernels import ops, reference
from offload_triforce.kernels.types import ChunkSelection

chunk_selection = pytest.importorskip("offload_triforce.kernels.chunk_selection", reason="needs Triton")

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def draw(device, *shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def assert_scores(packed, key, chunk, baseline, held):
    """Arithmetic is float32 whatever the dtype, hence one tolerance."""
    actual = chunk_selection.chunk_scores(packed, key, chunk, 0.125, baseline, held)
    expected = reference.chunk_scores(packed, key, chunk, 0.125, baseline, held)
    assert actual.shape == (key.shape[0], key.shape[1] // chunk)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@DTYPES
@pytest.mark.parametrize(
    ("heads", "rows", "chunks", "chunk", "dim"),
    [
        (2, 15, 33, 8, 64),
        (1, 1, 1, 4, 128),
        (3, 50, 5, 7, 80),
        (1, 4, 20, 1, 96),
        (2, 3, 17, 16, 256),
        (1, 20, 3, 100, 64),
    ],
)
def test_chunk_scores(device, heads, rows, chunks, chunk, dim, dtype):
    """Keys are part of a buffer that is NaN elsewhere, and what is held is part of a longer table."""
    buffer = torch.full((2, heads, chunks * chunk + 9, dim), math.nan, dtype=dtype, device=device)
    key = buffer[0, :, 4 : 4 + chunks * chunk]
    key.copy_(draw(device, *key.shape, dtype=dtype))
    held = draw(device, heads, chunks + 6, seed=3)[:, 2 : 2 + chunks] > 0.5
    packed = draw(device, heads, rows, dim, dtype=dtype, seed=1)
    baseline = draw(device, heads, rows, seed=2)
    assert_scores(packed, key, chunk, baseline, held)
    if chunk == 8:
        assert_scores(packed, key, chunk, baseline, None)


def test_baselines_of_any_size(device):
    """A query that attends to nothing else wants every chunk without bound; another's wish may vanish."""
    key, packed = draw(device, 2, 40, 64), draw(device, 2, 20, 64, seed=1)
    held = torch.zeros(2, 5, dtype=torch.bool, device=device)
    for baseline in (-math.inf, math.inf, 300.0, -300.0):
        rows = draw(device, 2, 20, seed=2)
        assert_scores(packed, key, 8, rows.fill_(baseline), held)
        rows = draw(device, 2, 20, seed=2)
        rows[0, 18], rows[1, 1] = baseline, baseline
        assert_scores(packed, key, 8, rows, held)


def new_choice(device, heads, slots, chunks):
    """Nothing chosen, out of ``chunks``. The held set is part of a larger table, as in a cache of many layers."""
    table = torch.zeros(heads, 3, chunks + 1, dtype=torch.bool, device=device)
    return ChunkSelection(
        torch.full((heads, slots), -math.inf, device=device),
        torch.full((heads, slots), -1, dtype=torch.long, device=device),
        table[:, 1],
    )


def assert_choices(device, offers, slots):
    """Offer tile after tile to both. They must agree exactly; returns the choice."""
    heads, chunks = offers[0].shape[0], sum(offer.shape[1] for offer in offers)
    selection, twin = new_choice(device, heads, slots, chunks), new_choice(device, heads, slots, chunks)
    first = 0
    for offer in offers:
        source = chunk_selection.select_chunks(selection, offer, first)
        assert source.dtype == torch.long
        assert torch.equal(source, reference.select_chunks(twin, offer, first))
        assert torch.equal(selection.scores, twin.scores)
        assert torch.equal(selection.chunks, twin.chunks)
        assert torch.equal(selection.held[:, :-1], twin.held[:, :-1])
        first += offer.shape[1]
    return selection


@st.composite
def tiles_of_scores(draw_):
    """Scores per tile, [K, C] each: with ties, and with chunks that are not on offer."""
    heads = draw_(st.integers(1, 3))
    value = st.integers(-4, 4).map(float) | st.just(-math.inf)
    sizes = draw_(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    rows = [st.lists(value, min_size=size, max_size=size) for size in sizes]
    return [torch.tensor([draw_(row) for _ in range(heads)]).reshape(heads, -1) for row in rows]


@given(tiles_of_scores(), st.integers(1, 12))
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_streaming_top_k_is_the_global_one(device, offers, slots):
    """Whatever the tiles, each head holds the best of all; what it holds is what the numbers say."""
    selection = assert_choices(device, [offer.to(device) for offer in offers], slots)
    everything = torch.cat(offers, dim=1)
    for head, scores in enumerate(everything.tolist()):
        best = sorted((score for score in scores if score > -math.inf), reverse=True)[:slots]
        numbers = selection.chunks[head].tolist()
        taken = [number for number in numbers if number >= 0]
        assert len(set(taken)) == len(taken) == len(best)
        assert sorted((scores[number] for number in taken), reverse=True) == best
        assert selection.scores[head].tolist() == [scores[n] if n >= 0 else -math.inf for n in numbers]
        assert selection.held[head, :-1].nonzero().flatten().tolist() == sorted(taken)


def test_of_equal_scores_the_held_chunk_wins_then_the_earlier(device):
    offers = [torch.tensor([[1.0, 1.0, 0.0, 1.0]]), torch.tensor([[1.0, 2.0, 1.0]]), torch.tensor([[2.0, 2.0, 2.0]])]
    selection = assert_choices(device, [offer.to(device) for offer in offers], 3)
    assert selection.chunks.tolist() == [[7, 8, 5]]


@pytest.mark.parametrize(("slots", "count"), [(70, 200), (300, 64), (130, 129)])
def test_choices_larger_than_a_block(device, slots, count):
    offers = [draw(device, 2, count, seed=seed).mul(20).round() for seed in range(4)]
    assert_choices(device, offers, slots)


def test_a_large_budget(device):
    slots, count = (4096, 2048) if device.type == "cuda" else (600, 900)
    assert_choices(
        device, [draw(device, 1, count, seed=seed) for seed in range(3 if device.type == "cuda" else 1)], slots
    )


def test_what_is_held_may_be_offered_again_as_minus_infinity(device):
    """A refresh scores what is held anew, then sees all chunks go by once more."""
    selection, twin = new_choice(device, 2, 6, 40), new_choice(device, 2, 6, 40)
    for round_ in range(3):
        for first in range(0, 40, 8):
            for each, backend in ((selection, chunk_selection), (twin, reference)):
                offered = draw(device, 2, 8, seed=40 * round_ + first)
                offered = offered.masked_fill(each.held[:, first : first + 8], -math.inf)
                backend.select_chunks(each, offered, first)
            assert torch.equal(selection.chunks, twin.chunks)
            assert torch.equal(selection.held[:, :-1], twin.held[:, :-1])


@DTYPES
@pytest.mark.parametrize(("chunk", "dim"), [(8, 64), (1, 80), (7, 96), (32, 128), (100, 128)])
def test_gather_chunks(device, chunk, dim, dtype):
    """Both tile and slots are parts of larger buffers; slots where nothing enters keep their content."""
    tile = draw(device, 2, 3, 9 * chunk + 5, dim, dtype=dtype)[:, :, 3 : 3 + 9 * chunk]
    cache = draw(device, 2, 3, 4 + 6 * chunk, dim, dtype=dtype, seed=1)
    twin = cache.clone()
    source = torch.tensor([[0, -1, 8, 3, -1, 2], [-1] * 6, [5, 4, 3, 2, 1, 0]], device=device)
    for backend, buffer in ((chunk_selection, cache), (reference, twin)):
        backend.gather_chunks(source, tile, buffer[:, :, 4:].unflatten(2, (6, chunk)))
    assert torch.equal(cache, twin)


@pytest.mark.parametrize(("far", "chunk"), [("heads", 1), ("tokens", 5), ("tokens", 1), ("rows", 5), ("held", 1)])
def test_offsets_of_scores_pass_two_to_the_31(device, arena, far, chunk):
    """Five heads, five tokens or five rows, 2^29 elements apart."""
    step = 1 << 29
    key, packed = draw(device, 2, 5, 5, 64, dtype=torch.float16)
    baseline, held = draw(device, 5, 5, seed=2), draw(device, 5, 5 // chunk, seed=3) > 0.5
    if far in ("heads", "tokens"):
        key = arena(key, (step, 64, 1) if far == "heads" else (320, step, 1))
    elif far == "rows":
        packed = arena(packed, (320, step, 1))
    else:
        held = arena(held, (step, 1))
    assert_scores(packed, key, chunk, baseline, held)


@pytest.mark.parametrize("far", ["scores", "chunks", "held", "offered"])
def test_offsets_of_choices_pass_two_to_the_31(device, arena, far):
    selection, twin = new_choice(device, 9, 3, 8), new_choice(device, 9, 3, 8)
    offers, strides = [draw(device, 9, 4, seed=seed) for seed in range(2)], (1 << 28, 1)
    if far == "offered":
        offers = [arena(offer, strides) for offer in offers]
    else:
        selection = selection._replace(**{far: arena(getattr(selection, far), strides)})
    for first, offer in zip((0, 4), offers, strict=True):
        source = chunk_selection.select_chunks(selection, offer, first)
        assert torch.equal(source, reference.select_chunks(twin, offer, first))
    for actual, expected in zip(selection, twin, strict=True):
        assert torch.equal(actual[:, :3], expected[:, :3])


@pytest.mark.parametrize("far", ["heads", "tokens", "chunks", "slots"])
def test_offsets_of_copies_pass_two_to_the_31(device, arena, far):
    step = 1 << 29
    source = torch.tensor([[4, -1, 2, 1, 3]] * (5 if far == "heads" else 2), device=device)
    heads = len(source)
    kv = draw(device, 2, heads, 5, 64, dtype=torch.float16)
    cache = draw(device, 2, heads, 5, 1, 64, dtype=torch.float16, seed=1)
    if far == "tokens":  # one chunk of five tokens
        source, cache = source.clamp(max=0)[:, 1:3], draw(device, 2, heads, 2, 5, 64, dtype=torch.float16, seed=1)
    twin = cache.clone()
    if far == "slots":
        cache = arena(cache, (1280, 64, step, 64, 1))
    else:
        kv = arena(kv, (1280, step, 64, 1) if far == "heads" else (1280, 320, step, 1))
    for backend, buffer in ((chunk_selection, cache), (reference, twin)):
        backend.gather_chunks(source, kv, buffer)
    assert torch.equal(cache, twin)


def test_rows_that_are_not_contiguous_are_refused(device):
    selection = new_choice(device, 2, 3, 8)
    with pytest.raises(ValueError, match="stride"):
        chunk_selection.select_chunks(selection, draw(device, 4, 2).t(), 0)
    with pytest.raises(ValueError, match="stride"):
        chunk_selection.chunk_scores(
            draw(device, 2, 3, 64), draw(device, 2, 64, 8).mT, 4, 1.0, selection.scores, selection.held
        )
    with pytest.raises(ValueError, match="stride"):
        chunk_selection.gather_chunks(selection.chunks, draw(device, 2, 2, 64, 8).mT, draw(device, 2, 2, 3, 4, 64))


def test_ops_use_the_kernels(device, monkeypatch):
    """On the CPU too, if asked."""
    monkeypatch.setenv("OFFLOAD_TRIFORCE_KERNELS", "triton")
    used = []
    for name, backend in itertools.product(
        ("chunk_scores", "select_chunks", "gather_chunks"), (chunk_selection, reference)
    ):
        monkeypatch.setattr(backend, name, lambda *_, which=(backend, name): used.append(which))
    tensor = draw(device, 1)
    ops.chunk_scores(tensor, tensor, 8, 1.0, tensor, tensor)
    ops.select_chunks(ChunkSelection(tensor, tensor, tensor), tensor, 0)
    ops.gather_chunks(tensor, tensor, tensor)
    assert used == [(chunk_selection, name) for name in ("chunk_scores", "select_chunks", "gather_chunks")]
