"""The Triton kernels that score and take chunks against their eager twins."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload_triforce.kernels import ops, reference
from offload_triforce.kernels.types import ChunkSelection, CodedChunks
from tests.usual import sampled

chunk_selection = pytest.importorskip("offload_triforce.kernels.chunk_selection", reason="needs Triton")
scores = pytest.importorskip("offload_triforce.kernels.chunk_scores", reason="needs Triton")

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def draw(device, *shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


# Both twins add up in float32, in another order, and round mean keys to the dtype: now and then to a neighbour.
# (And Triton's interpreter cuts a float32 off where a bfloat16 ends, instead of rounding it.)
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 3e-4}


def assert_scores(packed, key, chunk, baseline, held):
    actual = scores.chunk_scores(packed, key, chunk, 0.125, baseline, held)
    expected = reference.chunk_scores(packed, key, chunk, 0.125, baseline, held)
    assert actual.shape == (key.shape[0], key.shape[1] // chunk)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=TOLERANCES[key.dtype])


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
        (1, 70, 40, 4, 192),
        (1, 17, 2, 8, 512),
        (1, 130, 65, 2, 32),
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


def numbered(device, heads, chunks, first, chunk=1, dim=4):
    """A tile whose keys say which chunk and head they are of, and whose values are the negative of that."""
    number = torch.arange(first, first + chunks, device=device).repeat_interleave(chunk)
    key = number[None, :, None] + 1000.0 * torch.arange(heads, device=device)[:, None, None]
    return torch.stack([key, -key]).expand(-1, -1, -1, dim).contiguous()


class Twins:
    """The kernel and its eager twin, each with a selection and slots of its own, offered the same."""

    def __init__(self, device, heads, slots, chunks, chunk=1):
        self.device, self.heads, self.chunk, self.first = device, heads, chunk, 0
        self.backends = chunk_selection, reference
        self.selections = [new_choice(device, heads, slots, chunks) for _ in range(2)]
        self.stores = [torch.zeros(2, heads, slots, chunk, 4, device=device) for _ in range(2)]
        self.workspace = chunk_selection.make_workspace(self.selections[0])

    def offer(self, offered, first=None):
        """They must agree exactly; what lies in a slot is the chunk that the selection says."""
        first = self.first if first is None else first
        kv = numbered(self.device, self.heads, offered.shape[1], first, self.chunk)
        chunk_selection.take_chunks(self.selections[0], offered, first, kv, self.stores[0], self.workspace)
        reference.take_chunks(self.selections[1], offered, first, kv, self.stores[1])
        ours, theirs = self.selections
        assert torch.equal(ours.scores, theirs.scores)
        assert torch.equal(ours.chunks, theirs.chunks)
        assert torch.equal(ours.held[:, :-1], theirs.held[:, :-1])
        assert torch.equal(*self.stores)
        assert not self.workspace.arrived.any()
        for head, row in enumerate(ours.chunks.tolist()):
            kept = self.stores[0][0, head, :, 0, 0].tolist()
            assert all(have == number + 1000 * head for have, number in zip(kept, row, strict=True) if number >= 0)
        self.first = first + offered.shape[1]
        return ours


def assert_choices(device, offers, slots):
    """Offer tile after tile; returns the choice."""
    twins = Twins(device, offers[0].shape[0], slots, sum(offer.shape[1] for offer in offers))
    for offer in offers:
        selection = twins.offer(offer)
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
@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    offers = [draw(device, 2, count, seed=seed).mul(20).round() for seed in range(2)]
    assert_choices(device, offers, slots)


def test_a_large_budget(device):
    slots, count = (4096, 2048) if device.type == "cuda" else (600, 900)
    assert_choices(
        device, [draw(device, 1, count, seed=seed) for seed in range(3 if device.type == "cuda" else 1)], slots
    )


@pytest.mark.parametrize("value", [0.0, -math.inf, 1e-45, -3e38, 3e38])
def test_scores_of_any_size(device, value):
    """Zeros of both signs are equal, denormals are not zero, and what is not on offer enters no slot."""
    offers = [torch.tensor([[0.0, -0.0, value, 1.0, value]]), torch.tensor([[-0.0, value, -value, 0.0]])]
    assert_choices(device, [offer.to(device) for offer in offers], 4)


def test_what_is_held_may_be_offered_again_as_minus_infinity(device):
    """A refresh scores what is held anew, then sees all chunks go by once more."""
    twins = Twins(device, 2, 6, 40)
    for round_ in range(3):
        for first in range(0, 40, 8):
            offered = draw(device, 2, 8, seed=40 * round_ + first)
            twins.offer(offered.masked_fill(twins.selections[0].held[:, first : first + 8], -math.inf), first)


@pytest.mark.parametrize("programs", [2, 3, 7])
def test_any_number_of_programs_per_head(device, programs, monkeypatch):
    """More of them than chunks that enter, and fewer; in tile after tile, since each launch leaves the next a zero."""
    launch = chunk_selection.take_launch
    monkeypatch.setattr(
        chunk_selection, "take_launch", lambda *of: launch(*of)._replace(grid=(programs, of[0].scores.shape[0], 1))
    )
    assert_choices(device, [draw(device, 2, 9, seed=seed) for seed in range(3)], 5)


@pytest.mark.parametrize(
    ("dtype", "chunk", "dim"),
    sampled([*TOLERANCES], [(8, 64), (1, 80), (7, 96), (32, 128), (100, 128)], share=2),
    ids=str,
)
def test_chunks_are_copied(device, chunk, dim, dtype):
    """Both tile and slots are parts of larger buffers; slots where nothing enters keep their content."""
    tile = draw(device, 2, 3, 9 * chunk + 5, dim, dtype=dtype)[:, :, 3 : 3 + 9 * chunk]
    cache = draw(device, 2, 3, 4 + 6 * chunk, dim, dtype=dtype, seed=1)
    twin = cache.clone()
    offered = draw(device, 3, 9, seed=2).masked_fill(draw(device, 3, 9, seed=3) > 0, -math.inf)
    for backend, buffer in ((chunk_selection, cache), (reference, twin)):
        selection = new_choice(device, 3, 6, 9)
        backend.take_chunks(selection, offered, 0, tile, buffer[:, :, 4:].unflatten(2, (6, chunk)))
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
    twins = Twins(device, 9, 3, 8)
    offers, strides = [draw(device, 9, 4, seed=seed) for seed in range(2)], (1 << 28, 1)
    if far == "offered":
        offers = [arena(offer, strides) for offer in offers]
    else:
        selection = twins.selections[0]
        twins.selections[0] = selection._replace(**{far: arena(getattr(selection, far), strides)})
    for offer in offers:
        twins.offer(offer)


@pytest.mark.parametrize("far", ["heads", "tokens", "chunks", "slots"])
def test_offsets_of_copies_pass_two_to_the_31(device, arena, far):
    step = 1 << 29
    heads = 5 if far == "heads" else 2
    kv = draw(device, 2, heads, 5, 64, dtype=torch.float16)
    chunk = 5 if far == "tokens" else 1
    cache = draw(device, 2, heads, 5, chunk, 64, dtype=torch.float16, seed=1)
    twin = cache.clone()
    if far == "slots":
        cache = arena(cache, (1280, 64, step, 64, 1))
    else:
        kv = arena(kv, (1280, step, 64, 1) if far == "heads" else (1280, 320, step, 1))
    offered = draw(device, heads, 5 // chunk, seed=4)
    for backend, buffer in ((chunk_selection, cache), (reference, twin)):
        backend.take_chunks(new_choice(device, heads, 5, 5), offered, 0, kv, buffer)
    assert torch.equal(cache, twin)


def test_rows_that_are_not_contiguous_are_refused(device):
    selection = new_choice(device, 2, 3, 8)
    kv, store = draw(device, 2, 2, 8, 64), draw(device, 2, 2, 3, 4, 64)
    with pytest.raises(ValueError, match="stride"):
        chunk_selection.take_chunks(selection, draw(device, 4, 2).t(), 0, kv, store)
    with pytest.raises(ValueError, match="stride"):
        chunk_selection.take_chunks(selection, draw(device, 2, 2), 0, draw(device, 2, 2, 64, 8).mT, store)
    with pytest.raises(ValueError, match="stride"):
        scores.chunk_scores(draw(device, 2, 3, 64), draw(device, 2, 64, 8).mT, 4, 1.0, selection.scores, selection.held)


@pytest.mark.parametrize("bits", [4, 16])
def test_tile_after_tile(device, monkeypatch, bits):
    """``ops.RunningChoice`` over two layers: tiles of two sizes, some that are not aligned, and all that was bound."""
    heads, chunk, dim, slots = 2, 4, 32, 5
    outcomes = []
    for way in ("triton", "torch"):
        monkeypatch.setenv("OFFLOAD_TRIFORCE_KERNELS", way)
        running, outcome = ops.RunningChoice(), []
        buffer = torch.zeros(2, heads, 4 * chunk, dim, device=device)
        for layer in range(2):
            packed, baseline = draw(device, heads, 6, dim, seed=layer), draw(device, heads, 6, seed=9 + layer)
            selection = new_choice(device, heads, slots, 20)
            store = new_store(device, heads, slots, chunk, dim, bits)
            running.start(packed, baseline, 0.3, chunk, selection, store)
            text = draw(device, 2, heads, 20 * chunk + 1, dim, seed=20 + layer)[:, :, 1:]
            for first, last in ((0, 4), (4, 8), (8, 12), (12, 20)):
                tile = text[:, :, first * chunk : last * chunk]
                same = last - first == 4 and first != 4  # the same memory again, in each layer, and another between
                running.see(first, buffer.copy_(tile) if same else tile)
            outcome += [selection.chunks, selection.held[:, :-1], selection.scores, *(store if bits == 4 else [store])]
        outcomes.append(outcome)
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def new_store(device, heads, slots, chunk, dim, bits):
    if bits == 16:
        return torch.zeros(2, heads, slots, chunk, dim, device=device)
    codes = [torch.zeros(heads, slots, chunk, dim // 2, dtype=torch.uint8, device=device) for _ in range(2)]
    ranges = [torch.zeros(heads, slots, dim, dtype=torch.uint8, device=device) for _ in range(2)]
    tokens = [torch.zeros(heads, slots, chunk, dtype=torch.float16, device=device) for _ in range(2)]
    fixed = torch.full((heads, dim), -4.0, device=device), torch.full((heads, dim), 8.0, device=device)
    return CodedChunks(*codes, *ranges, *tokens, *fixed)


def test_ops_use_the_kernels(device, monkeypatch):
    """On the CPU too, if asked."""
    monkeypatch.setenv("OFFLOAD_TRIFORCE_KERNELS", "triton")
    used = []
    for name, module in (("chunk_scores", scores), ("take_chunks", chunk_selection)):
        for backend in (module, reference):
            monkeypatch.setattr(backend, name, lambda *_, which=(backend, name): used.append(which))
    tensor = draw(device, 1)
    ops.chunk_scores(tensor, tensor, 8, 1.0, tensor, tensor)
    ops.take_chunks(ChunkSelection(tensor, tensor, tensor), tensor, 0, tensor, tensor)
    assert used == [(scores, "chunk_scores"), (chunk_selection, "take_chunks")]
