"""Store and stream: right contents at any ring size, every tile moved once, copies ahead of the reader."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_triforce.scheduler.device import ThreadLane
from offload_triforce.scheduler.pipeline import TileStore, TileStream
from offload_triforce.scheduler.plan import TilePlan
from tests.scheduler.lanes import LANES, EagerLane, LateLane

CPU = torch.device("cpu")


def make_plan(layers=3, tiles=4, ring=2, resident=0.0):
    return TilePlan(layers, 2, 4, 4, tile_tokens=3, tiles=tiles, ring=ring, resident=resident)


def contents(layer, tile):
    """What test tiles hold: every element of every tile differs."""
    numbers = torch.arange(2 * 2 * 3 * 4, dtype=torch.float32).reshape(2, 2, 3, 4)
    return numbers + 1000 * layer + 100 * tile


class Pipeline:
    """A filled store and a stream over it."""

    def __init__(self, plan, lane="thread"):
        self.plan = plan
        self.incoming, self.outgoing = LANES[lane](), LANES[lane]()
        self.store = TileStore(plan, torch.float32, CPU, self.outgoing)
        self.stream = TileStream(self.store, self.incoming, torch.float32, CPU)
        for layer in range(plan.layers):
            for tile in range(plan.tiles):
                self.store.write(layer, tile, contents(layer, tile))
        self.store.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.incoming.close()
        self.outgoing.close()

    def check_layer(self, layer, tiles):
        """Read one layer of the pass under way. Each tile is looked at while it is the current one."""
        seen = []
        for tile in self.stream.tiles(layer):
            assert torch.equal(tile.kv, contents(layer, tile.index))
            seen.append(tile.index)
        assert seen == list(range(tiles))

    def check_pass(self, tiles):
        self.stream.begin(tiles)
        for layer in range(self.plan.layers):
            self.check_layer(layer, tiles)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("resident", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("ring", [1, 2, 3, 5, 20])
def test_contents_at_any_ring_size(ring, resident, lane):
    with Pipeline(make_plan(ring=ring, resident=resident), lane) as pipe:
        for tiles in (4, 1, 0, 3, 4):
            pipe.check_pass(tiles)


@pytest.mark.parametrize("resident", [0.0, 0.4, 1.0])
def test_each_streamed_tile_crosses_the_link_once(resident):
    with Pipeline(make_plan(ring=3, resident=resident)) as pipe:
        assert pipe.outgoing.moved == pipe.plan.host_bytes
        for tiles in (4, 2, 4):
            before = pipe.incoming.moved
            pipe.check_pass(tiles)
            assert pipe.incoming.moved - before == len(pipe.plan.stream_order(tiles)) * pipe.plan.tile_bytes
        assert pipe.outgoing.moved == pipe.plan.host_bytes, "a pass writes nothing back"


@pytest.mark.parametrize("resident", [0.0, 0.4])
@pytest.mark.parametrize("ring", [1, 2, 3, 5])
def test_begin_fills_the_ring_across_layers(ring, resident):
    """One tile per layer: a ring of 5 has to hold tiles of 5 layers before anybody asks for the first."""
    with Pipeline(make_plan(layers=9, tiles=1, ring=ring, resident=resident), "late") as pipe:
        pipe.stream.begin(1)
        order = pipe.plan.stream_order(1)
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


@pytest.mark.parametrize("lane", LANES)
def test_rewritten_tiles_are_fetched_anew(lane):
    with Pipeline(make_plan(resident=0.4), lane) as pipe:
        pipe.check_pass(4)
        for layer in range(3):
            pipe.store.write(layer, 1, contents(layer, 7))
        pipe.store.flush()
        pipe.stream.begin(2)
        for layer in range(3):
            first, second = (tile.kv.clone() for tile in pipe.stream.tiles(layer))
            assert torch.equal(first, contents(layer, 0))
            assert torch.equal(second, contents(layer, 7))


def test_flush_waits_for_the_writes():
    """The tail moves up right after a flush, so the copies have to be through by then."""
    store = TileStore(make_plan(), torch.float32, CPU, LateLane())
    source = contents(0, 0)
    store.write(0, 0, source)
    store.flush()
    source.zero_()
    assert torch.equal(store.place(0, 0), contents(0, 0))


class _OddStore(TileStore):
    """One of its tiles has the wrong shape."""

    def place(self, layer, tile):
        place = super().place(layer, tile)
        return place[:, :, :2] if (layer, tile) == (1, 2) else place


@pytest.mark.timeout(20)
def test_failed_fetch_raises_at_its_tile():
    plan, lane, out = make_plan(), ThreadLane(), EagerLane()
    stream = TileStream(_OddStore(plan, torch.float32, CPU, out), lane, torch.float32, CPU)
    stream.begin(4)
    assert len(list(stream.tiles(0))) == 4
    rest = stream.tiles(1)
    assert [next(rest).index, next(rest).index] == [0, 1]
    with pytest.raises(RuntimeError, match="copy over the link failed"):
        next(rest)
    lane.close()


@pytest.mark.timeout(20)
def test_failed_write_raises_at_flush():
    lane = ThreadLane()
    store = TileStore(make_plan(), torch.float32, CPU, lane)
    store.write(0, 0, torch.zeros(2, 2, 2, 4))
    with pytest.raises(RuntimeError, match="copy over the link failed"):
        store.flush()
    lane.close()
