"""The caches as the two target levels use them: draft, verify, choose anew on the way, commit, and again.

The levels are the real ones; the model is replaced by random keys, values and queries for every layer.
"""

from __future__ import annotations

import random
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_triforce.cache.full import FullCache
from offload_triforce.cache.retrieval import RetrievalCache, RetrievalShape
from offload_triforce.cache.window import WindowCache
from offload_triforce.kernels.ops import Rule
from offload_triforce.model.layout import LayerShape, ModelLayout
from offload_triforce.scheduler.emulated import EmulatedDevice
from offload_triforce.scheduler.pipeline import TileStore, TileStream
from offload_triforce.scheduler.plan import TilePlan
from offload_triforce.speculation import levels
from offload_triforce.speculation.text import TokenText
from tests.cache.chunk_choice import assert_best_choice, assert_holds, gather, positions
from tests.cache.plain_text import CPU, SCALING, PlainText, assert_attends
from tests.scheduler.devices import LateDevice

GAMMA = 4
BLOCK = GAMMA + 1
LIMIT = 400


class TargetRig:
    """All caches of a target beside a plain text that holds the target's own keys and values."""

    def __init__(self, windows, shape, tile, device=LateDevice, ring=2, resident=0.0, limit=LIMIT):
        self.windows, self.shape, self.limit = windows, shape, limit
        text = self.kv_text = PlainText(layers=len(windows))
        where = (text.dtype, CPU)
        shapes = tuple(LayerShape(text.kv_heads, text.dim, window) for window in windows)
        layout = ModelLayout(shapes, *where, vocabulary=7, max_positions=None, longrope_switch=None)
        heads = (text.kv_heads, text.dim)
        full = retrieval = window = None
        self.device = device()
        if layout.full:
            count = len(layout.full)
            plan = TilePlan(count, *heads, 4, tile, -(-limit // tile), ring=ring, resident=resident)
            stream = TileStream(TileStore(plan, text.dtype, self.device), self.device, text.dtype)
            full = FullCache(stream, shape.recent + shape.chunk + BLOCK, BLOCK, *where)
            retrieval = RetrievalCache(count, *heads, shape, BLOCK, *where, context=limit + 2 * BLOCK)
        if layout.sliding:
            window = WindowCache([w for w in windows if w], *heads, limit, BLOCK, *where)
        self.caches = levels.TargetCaches(layout, full, retrieval, window)
        self.target = levels.FullLevel(None, self.caches, mock.Mock(), refresh=True)
        self.middle = levels.RetrievalLevel(None, self.caches, mock.Mock())
        self.prompt(0)

    def close(self):
        self.device.close()

    def prompt(self, tokens):
        """Another text of that many tokens, and one more that nobody has read yet."""
        kv_text, caches = self.kv_text, self.caches
        kv_text.clear()
        kv_text.append(kv_text.draw(tokens))
        kv_text.commit(tokens)
        caches.reset()
        if tokens:
            queries = kv_text.queries(min(tokens, 16))
            near = max(0, tokens - max(self.shape.recent, queries.shape[2]))
            for layer, window in enumerate(self.windows):
                place, kv = caches.place[layer], kv_text.kv[layer]
                caches.fill_layer(layer, kv, queries[layer], Rule(SCALING, window))
                if window is None:
                    assert_best_choice(
                        caches.retrieval, place, queries[layer], kv, near, tokens, near >= self.shape.sink
                    )
        caches.end_fill(tokens)
        self.text = TokenText(torch.arange(tokens + 1), self.limit + 2 * BLOCK)
        self.refreshed = tokens
        self.check()

    def draft(self, guesses, accepted):
        """The retrieval level reads the unread end of the text and some guesses; the rest is taken back."""
        guesses = min(guesses, GAMMA - self.caches.drafted - 1)
        if guesses < 0:
            return
        self.text.append([0] * guesses)
        self.drafts = self.drafts if self.caches.drafted else self.kv_text.draw(0)
        with mock.patch.object(levels, "run", self.run_middle):
            self.middle.score(self.text, guesses)
        self.text.truncate(len(self.text) - guesses + min(accepted, guesses))
        self.middle.keep(len(self.text))
        self.drafts = self.drafts[:, :, :, : self.caches.drafted]
        self.text.append([0])  # the token that the level adds itself
        assert self.caches.drafted == len(self.text) - 1 - len(self.kv_text)

    def run_middle(self, _model, tokens, position, view, keep):
        kv_text, caches, length = self.kv_text, self.caches, len(self.kv_text)
        assert position == length + self.drafts.shape[3]
        kv, queries = kv_text.draw(len(tokens)), kv_text.queries(len(tokens))
        self.drafts = torch.cat([self.drafts, kv], dim=3)
        for layer, window in enumerate(self.windows):
            held = kv_text.kv[layer]
            if window is None:
                place = caches.place[layer]
                held = gather(held, positions(caches.retrieval, place, length, self.refreshed))
            output = view.attend(layer, queries[layer], *kv[layer], Rule(SCALING, window))
            assert_attends(output, queries[layer], torch.cat([held, self.drafts[layer]], dim=2), window)

    def verify(self, accepted):
        """The target reads all that was drafted, keeps some of it, and adds a token."""
        read = len(self.text) - len(self.kv_text)
        if len(self.text) > self.limit:
            self.prompt(20)
            return
        with mock.patch.object(levels, "run", self.run_target):
            self.target.score(self.text, read - 1)
        kept = 1 + min(accepted, read - 1)
        self.text.truncate(len(self.kv_text) - read + kept)
        self.target.keep(len(self.text))
        self.middle.keep(len(self.text))
        self.target.settle()
        self.refreshed = len(self.kv_text) - read
        self.kv_text.commit(kept)
        self.text.append([0])
        self.check()

    def run_target(self, _model, tokens, position, view, keep):
        kv_text, caches, length = self.kv_text, self.caches, len(self.kv_text)
        assert position == length
        kv, queries = kv_text.draw(len(tokens)), kv_text.queries(len(tokens))
        kv_text.append(kv)
        for layer, window in enumerate(self.windows):
            place, whole = caches.place[layer], kv_text.kv[layer]
            known = window is None and bool(caches.retrieval.chosen[place, 0, 0] >= 0)
            output = view.attend(layer, queries[layer], *kv[layer], Rule(SCALING, window))
            assert_attends(output, queries[layer], whole, window)
            if window is None:
                tail = caches.full.tiled
                assert_best_choice(caches.retrieval, place, queries[layer], whole, tail, length, known)

    def check(self):
        caches, kv_text, length = self.caches, self.kv_text, len(self.kv_text)
        assert caches.length == length == len(self.text) - 1
        assert caches.pending == caches.drafted == 0
        for layer, window in enumerate(self.windows):
            place, whole = caches.place[layer], kv_text.kv[layer]
            if window is None:
                assert torch.equal(caches.full.read(place), whole)
                assert_holds(caches.retrieval, place, whole, length, self.refreshed)
            else:
                held = caches.window.settled[place]
                assert held.shape[2] >= min(length, window)
                assert torch.equal(held, whole[:, :, length - held.shape[2] :])

    def run(self, rounds):
        for name, *numbers in rounds:
            getattr(self, name)(*numbers)


few = st.integers(0, GAMMA)
rounds = st.lists(
    st.one_of(
        st.tuples(st.just("draft"), few, few),
        st.tuples(st.just("verify"), few),
        st.tuples(st.just("draft"), few, few),
        st.tuples(st.just("verify"), few),
        st.tuples(st.just("prompt"), st.integers(0, 150)),
    ),
    min_size=8,
    max_size=30,
)


@st.composite
def shapes(draw):
    chunk, recent = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    sink = chunk * draw(st.integers(0, 2))
    return RetrievalShape(sink + recent + chunk * draw(st.integers(1, 8)), chunk, sink, recent)


LAYERS = {"full": [None, None], "mixed": [6, None, 17, None], "sliding": [6, 17]}


@pytest.mark.parametrize("windows", LAYERS.values(), ids=LAYERS)
@given(shapes(), st.integers(2, 6), st.integers(1, 3), st.sampled_from([0.0, 0.4, 1.0]), rounds)
@settings(deadline=None, max_examples=30)
def test_levels_see_what_a_plain_list_says(windows, shape, chunks, ring, resident, rounds):
    rig = TargetRig(windows, shape, tile=chunks * shape.chunk, ring=ring, resident=resident)
    rig.run(rounds)


def test_thousands_of_steps():
    chance = random.Random(0)
    shape = RetrievalShape(72, 4, 4, 16)
    rig = TargetRig([None, 24], shape, tile=128, device=EmulatedDevice, ring=2, resident=0.4, limit=4000)
    rig.prompt(40)
    for _ in range(1000):
        for _ in range(chance.randint(0, 2)):
            rig.draft(chance.randint(0, GAMMA), chance.randint(0, GAMMA))
        rig.verify(chance.randint(0, GAMMA))
    assert len(rig.text) > 1500
    rig.close()


def test_drafts_leave_no_trace():
    """What the retrieval level writes is gone before the target reads: also in the window that both share."""
    rig = TargetRig(LAYERS["mixed"], RetrievalShape(24, 4, 4, 8), tile=8)
    rig.run([("prompt", 60), ("draft", 1, 1), ("draft", 1, 0), ("verify", 1), ("draft", 2, 2), ("verify", 0)])
    assert len(rig.text) == 60 + 2 + 1 + 1


def test_choosing_costs_no_link_bytes():
    """A pass fetches each streamed tile once, and a refresh is made of what it fetches anyway."""
    rig = TargetRig([None, None], RetrievalShape(24, 4, 4, 8), tile=8)
    rig.prompt(100)
    to_host, to_device = rig.device.outgoing, rig.device.incoming
    full = rig.caches.full
    assert full.tiles == (100 - full.keep) // 8
    assert (to_host.moved, to_device.moved) == (2 * full.tiles * full.stream.plan.tile_bytes, 0)
    rig.run([("draft", 2, 2)])
    assert to_device.moved == 0, "drafting does without the link"
    rig.run([("verify", 2)])
    assert to_device.moved == 2 * full.tiles * full.stream.plan.tile_bytes
