"""The retrieval cache alone: the text is shown to it tile by tile, and it must hold what is best of all of it."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from offload_triforce.cache.retrieval import RetrievalCache
from offload_triforce.cache.sizes import RetrievalShape
from offload_triforce.errors import InputError
from offload_triforce.kernels import ops
from tests.cache.chunk_choice import assert_best_choice, assert_holds, held_tokens
from tests.cache.plain_text import CPU, RULE, SCALING, PlainText, assert_attends
from tests.usual import first

BLOCK = 4
CONTEXT = 20_000


class RetrievalRig:
    """A retrieval cache beside the whole text."""

    def __init__(self, shape, tile, layers=2):
        self.shape, self.tile, self.text = shape, tile, PlainText(layers)
        text = self.text
        self.cache = RetrievalCache(*text.shape, text.dim, shape, BLOCK, BLOCK, text.dtype, CPU, context=CONTEXT)

    def restart(self, tokens):
        """A prompt, whose last queries make the first choice. The context goes by in one piece."""
        text = self.text
        self.cache.reset()
        text.clear()
        text.append(text.draw(tokens))
        if tokens:
            asking = min(tokens, 16)
            near = max(0, tokens - max(self.shape.recent, asking))
            self.refresh(text.queries(asking), near, tokens, tile=tokens)
        self.sync(tokens)

    def grow(self, tokens):
        """A pass of that many new tokens, all of which are accepted."""
        text, refreshed = self.text, len(self.text)
        text.append(text.draw(tokens))
        tail = self.shape.recent_start(refreshed) // self.tile * self.tile
        self.refresh(text.queries(tokens), tail, refreshed, self.tile)
        self.sync(refreshed)

    def refresh(self, queries, tail, length, tile):
        for layer in range(self.text.layers):
            kv, before = self.text.kv[layer], self.cache.chosen[layer].clone()
            packed = ops.pack_queries(queries[layer], kv.shape[1])
            near = kv[:, :, tail:]
            attention = ops.RunningAttention()
            attention.start(queries[layer], kv.shape[1], RULE)
            attention.update(*near, ops.TreeMask(ops.causal_mask(queries.shape[2], queries.shape[2])))
            refresh = self.cache.refresh(layer, packed, attention.logsumexp(), SCALING, length)
            for start in range(0, length, tile):
                part = kv[:, :, start : min(start + tile, length)].clone()
                refresh.see(start, part)
                part.zero_()  # tiles are staging buffers: what was chosen must have been copied
            known = bool(before[0, 0] >= 0)
            assert_best_choice(self.cache, layer, queries[layer], kv, tail, length, known)
            after = self.cache.chosen[layer]
            stays = (before[:, :, None] == after[:, None, :]) & (before >= 0)[:, :, None]
            assert not (stays & ~torch.eye(self.shape.slots, dtype=torch.bool)).any(), "a slot has moved"

    def sync(self, refreshed):
        start = self.shape.recent_start(refreshed) // self.tile * self.tile  # as the tail does, at a tile
        self.cache.sync(self.text.kv[:, :, :, start:], start, len(self.text), refreshed)
        self.refreshed = refreshed
        assert self.cache.pending == 0
        for layer in range(self.text.layers):
            assert_holds(self.cache, layer, self.text.kv[layer], len(self.text), refreshed)

    def draft(self, tokens):
        """Draft tokens behind the text, attending to what is held; then taken back."""
        kv, queries = self.text.draw(tokens), self.text.queries(tokens)
        for layer in range(self.text.layers):
            held = held_tokens(self.cache, layer, self.text.kv[layer], len(self.text), self.refreshed)
            seen = torch.cat([held, kv[layer]], dim=2)
            output = self.cache.attend_draft(layer, queries[layer], *kv[layer], RULE)
            assert_attends(output, queries[layer], seen)
        self.cache.end_step(tokens)
        self.cache.commit(0)

    def run(self, operations):
        for name, tokens in operations:
            getattr(self, name)(tokens)


@st.composite
def rigs(draw, slots=None):
    chunk, recent = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    sink = chunk * draw(st.integers(0, 3))
    budget = sink + recent + chunk * (slots or draw(st.integers(1, 6))) + draw(st.integers(0, chunk - 1))
    tile = chunk * draw(st.integers(max(1, sink // chunk), 6))
    return RetrievalRig(RetrievalShape(budget, chunk, sink, recent), tile)


few = st.integers(1, BLOCK)
operations = st.lists(
    st.tuples(st.sampled_from(["grow", "grow", "draft"]), few) | st.tuples(st.just("restart"), st.integers(0, 90)),
    min_size=5,
    max_size=25,
)


@given(rigs(), st.integers(0, 90), operations)
@settings(deadline=None, max_examples=25)
def test_holds_the_best_chunks_of_a_growing_text(rig, prompt, steps):
    rig.run([("restart", prompt), *steps])


@given(rigs(slots=100), st.integers(0, 90), operations)
@settings(deadline=None, max_examples=12)
def test_a_budget_for_everything_attends_to_everything(rig, prompt, steps):
    """Then it is the full cache, in another order."""
    for operation in [("restart", prompt), *steps]:
        rig.run([operation])
        kv, query, text = rig.text.draw(2), rig.text.queries(2), rig.text
        for layer in range(text.layers):
            output = rig.cache.attend_draft(layer, query[layer], *kv[layer], RULE)
            assert_attends(output, query[layer], torch.cat([text.kv[layer], kv[layer]], dim=2))


@pytest.mark.parametrize("steps", first(1, [600, 2000]))
def test_thousands_of_steps(steps):
    chance = random.Random(0)
    rig = RetrievalRig(RetrievalShape(64, 4, 4, 12), tile=256, layers=1)
    names = ["grow"] * 3 + ["draft"] * 5
    rig.run([("restart", 50), *[(chance.choice(names), chance.randint(1, BLOCK)) for _ in range(steps)]])
    assert len(rig.text) > steps / 2


@pytest.mark.parametrize("prompt", range(18, 30))
def test_sink_is_held_from_the_first_choice_on(prompt):
    """Right where the recent window leaves the sink behind: there is no chunk to choose yet."""
    RetrievalRig(RetrievalShape(64, 8, 8, 12), tile=8).run([("restart", 90), ("restart", prompt), ("grow", 2)])


def test_without_a_sink():
    RetrievalRig(RetrievalShape(40, 4, 0, 8), tile=8).run([("restart", 90), ("grow", 2), ("grow", 3)])


def test_the_choice_follows_the_queries():
    """Each axis has a chunk whose keys point along it; there is room for one chunk at a time."""
    rig, needles = RetrievalRig(RetrievalShape(16, 4, 4, 8), tile=8, layers=1), (15, 3, 9, 19)
    kv = rig.text.draw(90)
    for axis, chunk in enumerate(needles):
        kv[:, 0, :, chunk * 4 : chunk * 4 + 4, axis] = 20
    rig.text.append(kv)
    for axis, chunk in enumerate(needles):
        query = torch.zeros(1, rig.text.heads, 1, rig.text.dim)
        query[..., axis] = 5
        rig.refresh(query, 80, 90, tile=8)
        assert (rig.cache.chosen == chunk).all()
        rig.sync(90)


@given(st.integers(1, 8), st.integers(0, 4), st.integers(1, 40), st.integers(0, 200))
@example(chunk=8, sinks=1, recent=64, length=72)
def test_sink_pool_and_recent_window_are_the_whole_text(chunk, sinks, recent, length):
    shape = RetrievalShape(sinks * chunk + recent + chunk, chunk, sinks * chunk, recent)
    begin, pool = shape.recent_start(length), shape.pool(length)
    assert begin % chunk == 0
    assert length - begin >= min(recent, length)
    if begin == 0:
        assert len(pool) == 0
        assert length < shape.sink + recent + chunk
    else:
        assert (pool.start * chunk, pool.stop * chunk) == (shape.sink, begin)
        assert length - begin < recent + chunk


@given(st.integers(1, 200), st.integers(1, 8), st.integers(0, 4), st.integers(1, 40))
def test_shape_never_promises_more_than_the_budget(budget, chunk, sinks, recent):
    least = sinks * chunk + recent + chunk
    if budget < least:
        with pytest.raises(InputError, match=f"need at least {least} tokens"):
            RetrievalShape(budget, chunk, sinks * chunk, recent)
        return
    shape = RetrievalShape(budget, chunk, sinks * chunk, recent)
    assert 0 <= budget - (shape.sink + shape.slots * chunk + recent) < chunk


@given(st.integers(2, 8), st.integers(1, 40))
def test_sink_is_whole_chunks(chunk, sink):
    assume(sink % chunk)
    with pytest.raises(InputError, match=f"multiple of the chunk of {chunk} tokens, not {sink}"):
        RetrievalShape(1000, chunk, sink, 8)
