"""Store and stream: right contents at any ring size, every tile moved once, copies ahead of the reader."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from offload_triforce.scheduler import pipeline
from offload_triforce.scheduler.emulated import EmulatedDevice
from offload_triforce.scheduler.pipeline import TileStream
from offload_triforce.scheduler.plan import TilePlan
from offload_triforce.scheduler.store import Leaving, TileStore
from tests.scheduler.devices import DEVICES, LateDevice


def make_plan(layers=3, tiles=4, ring=2, resident=0.0):
    return TilePlan(layers, 2, 4, 4, tile_tokens=3, tiles=tiles, ring=ring, resident=resident)


def contents(layer, tile):
    """What test tiles hold: every element of every tile differs."""
    numbers = torch.arange(2 * 2 * 3 * 4, dtype=torch.float32).reshape(2, 2, 3, 4)
    return numbers + 1000 * layer + 100 * tile


class Pipeline:
    """A filled store and a stream over it."""

    def __init__(self, plan, device="thread"):
        self.plan = plan
        self.device = DEVICES[device]()
        self.incoming, self.outgoing = self.device.incoming, self.device.outgoing
        self.store = TileStore(plan, torch.float32, self.device)
        self.stream = TileStream(self.store, self.device, torch.float32)
        for layer in range(plan.layers):
            for tile in range(plan.tiles):
                self.store.write(layer, tile, contents(layer, tile)).wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.device.close()

    def check_layer(self, layer, tiles):
        """Read one layer of the pass under way. Each tile is looked at while it is the current one."""
        seen = []
        for tile in self.stream.tiles(layer):
            self.device.launch("look", lambda tile: seen.append((tile.index, tile.kv.clone())), tile)
        self.device.finish()
        assert [index for index, _ in seen] == list(range(tiles))
        for index, kv in seen:
            assert torch.equal(kv, contents(layer, index))

    def check_pass(self, tiles):
        self.stream.begin(tiles)
        for layer in range(self.plan.layers):
            self.check_layer(layer, tiles)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("resident", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("ring", [1, 2, 3, 5, 20])
def test_contents_at_any_ring_size(ring, resident, device):
    with Pipeline(make_plan(ring=ring, resident=resident), device) as pipe:
        for tiles in (4, 1, 0, 3, 4):
            pipe.check_pass(tiles)


@pytest.mark.parametrize("resident", [0.0, 0.4, 1.0])
def test_each_streamed_tile_crosses_the_link_once(resident):
    with Pipeline(make_plan(ring=3, resident=resident)) as pipe:
        assert pipe.outgoing.moved == pipe.plan.host_bytes
        for tiles in (4, 2, 4):
            before = pipe.incoming.moved
            pipe.check_pass(tiles)
            assert pipe.incoming.moved - before == pipe.plan.streamed_bytes(tiles)
        assert pipe.outgoing.moved == pipe.plan.host_bytes, "a pass writes nothing back"


@pytest.mark.parametrize("resident", [0.0, 0.4])
@pytest.mark.parametrize("ring", [1, 2, 3, 5])
def test_begin_fills_the_ring_across_layers(ring, resident):
    """One tile per layer: a ring of 5 has to hold tiles of 5 layers before anybody asks for the first."""
    with Pipeline(make_plan(layers=9, tiles=1, ring=ring, resident=resident), "late") as pipe:
        pipe.stream.begin(1)
        order = list(pipe.plan.stream_order(1))
        sources = [source for _, source in pipe.incoming.submitted]
        assert len(sources) == ring
        for source, (layer, tile) in zip(sources, order, strict=False):
            assert source.data_ptr() == pipe.store.place(layer, tile).data_ptr()


@pytest.mark.parametrize("ring", [1, 2, 4])
def test_ring_stays_full_until_the_last_copy(ring):
    """By the time of tile n, n - 1 slots have come free: ring + n - 1 copies have been submitted."""
    with Pipeline(make_plan(ring=ring), "late") as pipe:
        pipe.stream.begin(4)
        asked = 0
        for layer in range(3):
            for _ in pipe.stream.tiles(layer):
                asked += 1
                assert len(pipe.incoming.submitted) == min(12, ring + asked - 1)


@given(st.integers(1, 5), st.floats(0, 1), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 13)), max_size=6))
@settings(deadline=None, max_examples=50)
def test_interrupted_passes_leave_no_trace(ring, resident, interrupted):
    """A pass may be given up anywhere, even inside a layer; the next one starts afresh."""
    with Pipeline(make_plan(ring=ring, resident=resident)) as pipe:
        for tiles, steps in interrupted:
            pipe.stream.begin(tiles)
            every = ((la, tile) for la in range(3) for tile in pipe.stream.tiles(la))
            for (layer, tile), _ in zip(every, range(steps), strict=False):
                assert torch.equal(tile.kv, contents(layer, tile.index))
        pipe.check_pass(4)


@pytest.mark.parametrize("steps", range(13))
def test_an_interrupted_pass_gives_all_slots_back(steps):
    with Pipeline(make_plan(ring=3), "late") as pipe:
        pipe.stream.begin(4)
        for _ in zip(range(steps), (tile for la in range(3) for tile in pipe.stream.tiles(la)), strict=False):
            pass
        before = len(pipe.incoming.submitted)
        pipe.stream.begin(4)
        assert len(pipe.incoming.submitted) == before + 3


@pytest.mark.parametrize("device", DEVICES)
def test_rewritten_tiles_are_fetched_anew(device):
    with Pipeline(make_plan(resident=0.4), device) as pipe:
        pipe.check_pass(4)
        for layer in range(3):
            pipe.store.write(layer, 1, contents(layer, 7)).wait()
        pipe.stream.begin(2)
        for layer in range(3):
            seen = []
            for tile in pipe.stream.tiles(layer):
                pipe.device.launch("look", lambda tile, seen=seen: seen.append(tile.kv.clone()), tile)
            pipe.device.finish()
            assert torch.equal(seen[0], contents(layer, 0))
            assert torch.equal(seen[1], contents(layer, 7))


def test_leaving_waits_for_the_copies_of_the_first_tokens():
    """The prefill overwrites a layer's buffer from the front, while the layer before is still leaving it."""
    device = LateDevice()
    store = TileStore(make_plan(), torch.float32, device)
    sources = [contents(0, tile) for tile in range(4)]
    leaving = Leaving()
    for tile, source in enumerate(sources):
        leaving.add(3 * tile, store.write(0, tile, source))
    leaving.wait(4)
    assert device.outgoing.started == 2, "token 3 lies in the second tile"
    sources[0].zero_()
    sources[1].zero_()
    leaving.wait()
    for tile in range(4):
        assert torch.equal(store.place(0, tile), contents(0, tile))


class _OddStore(TileStore):
    """One of its tiles cannot be read."""

    def source(self, layer, tile):
        source = super().source(layer, tile)
        return source.to("meta") if (layer, tile) == (1, 2) else source


@pytest.mark.timeout(20)
def test_failed_fetch_raises_at_its_tile():
    plan, device = make_plan(), EmulatedDevice()
    stream = TileStream(_OddStore(plan, torch.float32, device), device, torch.float32)
    stream.begin(4)
    assert len(list(stream.tiles(0))) == 4
    rest = stream.tiles(1)
    assert [next(rest).index, next(rest).index] == [0, 1]
    with pytest.raises(RuntimeError, match="copy over the link failed"):
        next(rest)
    device.close()


@pytest.mark.timeout(20)
def test_failed_write_raises_where_it_is_waited_for():
    device = EmulatedDevice()
    store = TileStore(make_plan(), torch.float32, device)
    written = store.write(0, 0, torch.zeros(2, 2, 2, 4))
    with pytest.raises(RuntimeError, match="copy over the link failed"):
        written.wait()
    device.close()


class _Counting(TorchDispatchMode):
    """Writes down every operation that torch is asked for on this thread."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_pass_allocates_nothing():
    """The pipeline only hands out views of the ring."""
    with Pipeline(make_plan(ring=2, resident=0.4)) as pipe, _Counting() as counting:
        pipe.stream.begin(4)
        assert sum(1 for layer in range(3) for _ in pipe.stream.tiles(layer)) == 12
    assert set(counting.seen) <= {"select", "slice", "view", "detach"}, "views all"


class Clock:
    """Time passes when somebody says so."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(pipeline.time, "perf_counter", lambda: self.now)

    def take(self, seconds):
        self.now += seconds


def test_what_a_pass_leaves_time_for(monkeypatch):
    """12 tiles in 6 s, a ring of 2: it covers 1 s. Of longer pieces of work, no more than that is spare."""
    with Pipeline(make_plan(ring=2), "late") as pipe:
        clock = Clock(monkeypatch)

        def run(*pieces, rest):
            left = list(pieces)
            pipe.stream.begin(4)
            for layer in range(3):
                for _ in pipe.stream.tiles(layer, lambda: clock.take(left.pop() if left else 0.0)):
                    pass
            clock.take(rest)
            return pipe.stream.slack()

        assert run(rest=6.0) == (0.0, 1.0)
        assert run(0.25, 0.5, rest=5.25) == (0.75, 1.0)
        assert run(3.0, 0.5, rest=5.0) == (1.5, 1.0), "the link stood still for 2 s, which is nothing to do more in"
        assert run(rest=3.0) == (0.0, 0.5), "the link is faster than it seemed"
        assert run(0.75, rest=5.0) == (0.5, 0.5)
        pipe.stream.forget_speed()
        assert run(rest=6.0) == (0.0, 1.0), "a text later, it may be slower again"


def test_tiles_that_are_queued_are_no_other_work(monkeypatch):
    """The device is given 1 s of tiles before each piece of other work of 0.25 s, all at once by the host's clock."""
    with Pipeline(make_plan(ring=2), "late") as pipe:
        clock, end = Clock(monkeypatch), [0.0]

        class Point(float):
            def since(self, earlier):
                return self - earlier

        def after(seconds):
            end[0] += seconds

        pipe.device.mark = lambda: Point(end[0])
        pipe.stream.begin(4)
        for layer in range(3):
            for number, _ in enumerate(pipe.stream.tiles(layer, lambda: after(0.25))):
                after(1.0)
                if layer == number == 0:
                    clock.take(8.0)
        assert pipe.stream.slack() == (0.0, 8 / 12 * 2), "what the ring covered is known from the second pass on"
        pipe.stream.begin(4)
        for layer in range(3):
            for _ in pipe.stream.tiles(layer, lambda: after(0.25)):
                after(1.0)
        clock.take(8.0)
        assert pipe.stream.slack() == (12 * 0.25, 8 / 12 * 2)


def test_nothing_streamed_leaves_no_time():
    with Pipeline(make_plan(ring=2, resident=1.0)) as pipe:
        pipe.check_pass(4)
        assert pipe.stream.slack() == (0.0, 0.0)


def test_time_spent_waiting_is_spare():
    """On the emulated device, by the real clock: whatever is not waited for was spent in ``idle``."""
    with Pipeline(make_plan(ring=3)) as pipe:
        pipe.device.latency_us = 5000.0
        pipe.check_pass(4)
        assert 0.03 < pipe.stream.slack().spare < 0.2
