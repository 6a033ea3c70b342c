"""The full cache against a plain list: any sequence of steps, any ring, any resident share."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_triforce.cache.full import FullCache
from offload_triforce.scheduler.emulated import EmulatedDevice
from offload_triforce.scheduler.pipeline import TileStream
from offload_triforce.scheduler.plan import TilePlan
from offload_triforce.scheduler.store import TileStore
from tests.cache.plain_text import CPU, RULE, PlainText, Rig, assert_attends, many_operations, operations
from tests.scheduler.devices import LateDevice

SESSION = ("cut", "read_on", "park")  # what a session does with the text


class FullRig(Rig):
    def __init__(self, text, device, tile=8, tiles=12, keep=5, ring=2, resident=0.0):
        self.plan = TilePlan(*text.shape, text.dim, text.dtype.itemsize, tile, tiles, ring=ring, resident=resident)
        self.device = device()
        self.incoming, self.outgoing = self.device.incoming, self.device.outgoing
        self.keep_on_device, self.written = keep, 0
        stream = TileStream(TileStore(self.plan, text.dtype, self.device), self.device, text.dtype)
        super().__init__(FullCache(stream, keep, self.block, self.block, text.dtype, CPU), text, limit=tile * tiles)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.device.close()

    def restart(self, tokens):
        self.written = self.outgoing.moved
        super().restart(tokens)

    def back(self, tokens):
        super().back(tokens)
        if self.saved is not None:  # tiles that were leaving then leave once more
            left = max(0, self.cache.length - self.keep_on_device) // self.plan.tile_tokens
            self.written = self.outgoing.moved - self.plan.streamed_bytes(left)

    def cut(self, tokens):
        """Back to some place in the text, near or far; what is pending goes, and no snapshot is good any more."""
        keep = max(0, self.text.committed - (1, 3, 9, 20, 50)[tokens])
        self.cache.cut(keep)
        self.text.kv, self.text.pending = self.text.kv[:, :, :, :keep], 0
        self._went_back()

    def read_on(self, tokens):
        """A prefill behind what is held, which comes to the device layer by layer, once."""
        self.rollback(0)
        held, more = self.text.committed, min(5 * tokens, self.limit - self.text.committed)
        if not held or not more:
            return
        news = self.text.draw(more)
        fetched = self.incoming.moved + self.plan.streamed_bytes(self.cache.tiles)
        self.cache.begin_fill()
        whole = torch.cat([self.text.kv, news], dim=3)
        for layer in range(self.text.layers):
            kv = torch.cat([torch.full_like(self.text.kv[layer], float("nan")), news[layer]], dim=2)
            self.cache.load(layer, kv[:, :, :held])
            assert torch.equal(kv, whole[layer])
            self.cache.fill(layer, kv, self.text.queries(1)[layer], RULE).wait()
        self.cache.end_fill(held + more)
        assert self.incoming.moved == fetched
        self.text.append(news)
        self.text.pending = 0
        self.saved = None

    def park(self, _):
        """The text goes, and comes back from a copy."""
        self.rollback(0)
        self.cache.still()
        held = self.cache.length
        copies = [self.cache.copy_out(layer, 0, held) for layer in range(self.text.layers)]
        middle = self.cache.copy_out(0, held // 3, held - held // 5)
        assert torch.equal(middle, self.text.kv[0, :, :, held // 3 : held - held // 5])
        self.cache.reset()
        self.cache.still()
        self.cache.adopt(held, lambda layer, start, stop: copies[layer][:, :, start:stop])
        self._went_back()

    def _went_back(self):
        left = max(0, self.cache.length - self.keep_on_device) // self.plan.tile_tokens
        self.written, self.saved = self.outgoing.moved - self.plan.streamed_bytes(left), None

    def begin(self):
        self.fetched = self.incoming.moved + self.plan.streamed_bytes(self.cache.tiles)
        self.cache.begin_step()

    def attend(self, layer, query, key, value):
        output = self.cache.attend(layer, query, key, value, RULE)
        assert_attends(output, query, self.text.kv[layer])
        if layer == self.text.layers - 1:
            assert self.incoming.moved == self.fetched, "a pass fetches every streamed tile once"

    def check(self):
        cache, text = self.cache, self.text
        assert cache.length == text.committed
        for layer in range(text.layers):
            assert torch.equal(cache.read(layer), text.kv[layer, :, :, : text.committed])
        assert min(cache.length, self.keep_on_device) <= cache.length - cache.tiled
        tile = self.plan.tile_tokens
        left = max(0, cache.length - self.keep_on_device) // tile  # whole tiles that have left, or are leaving
        assert left - cache.tiles <= -(-self.block // tile), (
            "those of one commit, which the next pass reads in the tail"
        )
        crossed = self.plan.streamed_bytes(left)
        assert self.outgoing.moved - self.written == crossed, "whole tiles only, once, and nothing pending"


@pytest.mark.parametrize("resident", [0.0, 0.4, 1.0])
@given(operations(most=4, more=SESSION), st.integers(1, 3), st.integers(1, 3), st.sampled_from([0, 5, 11]))
@settings(deadline=None, max_examples=25)
def test_equals_a_plain_list(resident, steps, layers, ring, keep):
    with FullRig(PlainText(layers), LateDevice, ring=ring, keep=keep, resident=resident) as rig:
        rig.run(steps)


@given(operations(most=4, more=SESSION), st.integers(1, 9), st.floats(0, 1))
@settings(deadline=None, max_examples=25)
def test_equals_a_plain_list_over_a_thread(steps, tile, resident):
    with FullRig(PlainText(), EmulatedDevice, tile=tile, tiles=72 // tile, resident=resident) as rig:
        rig.run(steps)


@pytest.mark.parametrize(("steps", "tile"), [(800, 16), pytest.param(2500, 64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_thousands_of_steps(dtype, steps, tile):
    text = PlainText(dtype=dtype)
    with FullRig(text, EmulatedDevice, tile=tile, tiles=30, keep=20, ring=3, resident=0.4) as rig:
        rig.run(many_operations(steps, most=4))
        assert rig.cache.tiles >= 5


def test_a_commit_may_fill_several_tiles():
    with FullRig(PlainText(), LateDevice, tile=1, tiles=40, keep=2) as rig:
        rig.run([("step", 4), ("commit", 4), ("step", 4), ("commit", 3)])
        assert rig.cache.tiles == 2, "three tiles are leaving, and still read in the tail"
        rig.run([("rollback", 0)])
        assert rig.cache.tiles == 5


def test_pending_tokens_stay_on_the_device():
    """Drafted tokens never reach the tiles before they are accepted, however many tiles they would fill."""
    with FullRig(PlainText(), LateDevice, tile=1, keep=0) as rig:
        rig.run([("step", 4)])
        assert (rig.cache.tiles, rig.outgoing.moved) == (0, 0)
        rig.run([("keep", 2), ("rollback", 0)])
        assert (rig.cache.tiles, rig.outgoing.moved) == (0, 0)


def test_observer_sees_every_committed_token_once_and_in_order():
    """And is made with the attention over the tail: committed, pending and new tokens, as far as visible."""
    seen, made = [], []
    observer = SimpleNamespace(see=lambda start, kv: seen.append((start, kv.clone())))

    def observe(packed, baseline, scaling):
        made.append((packed, baseline, scaling))
        return observer

    with FullRig(PlainText(layers=1), EmulatedDevice, ring=6, resident=0.4) as rig:
        rig.run([("restart", 45), ("step", 2)])
        kv, query = rig.text.draw(2), rig.text.queries(2)
        rig.cache.begin_step()
        rig.cache.attend(0, query[0], *kv[0], RULE, observe)
        assert [start for start, _ in seen] == [0, 8, 16, 24, 32, 40]
        assert torch.equal(torch.cat([part for _, part in seen], dim=2), rig.text.kv[0, :, :, :45])
        ((packed, baseline, scaling),) = made
        near = torch.cat([rig.text.kv[0, 0, :, 40:], kv[0, 0]], dim=1)
        scores = packed @ near.mT * scaling
        scores[:, ::2, -1] = float("-inf")  # the first of two new tokens does not see the second
        torch.testing.assert_close(baseline, scores.logsumexp(-1))
