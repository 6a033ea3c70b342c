"""Late tiles: in host memory until the prompt has been read, on the device from then on, with the same numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload_triforce.scheduler import late
from offload_triforce.scheduler.pipeline import TileStream
from offload_triforce.scheduler.plan import TilePlan
from offload_triforce.scheduler.store import TileStore
from tests.scheduler.devices import DEVICES, EagerDevice, chaotic

PLAN = TilePlan(2, 1, 4, 4, tile_tokens=3, tiles=5, ring=2, resident=0.6, late=4)
ALL_RESIDENT = replace(PLAN, resident=1.0, late=6)
SHAPE = (2, 1, 3, 4)
SEEDS = range(12)


@given(st.integers(1, 7), st.integers(1, 9), st.floats(0, 1), st.floats(0, 1))
def test_late_tiles_are_resident_ones_and_spread_evenly(layers, tiles, resident, share):
    plan = TilePlan(layers, 1, 4, 4, tile_tokens=3, tiles=tiles, ring=2, resident=resident)
    there = plan.resident_tiles()
    plan = replace(plan, late=int(len(there) * share))
    flags = [plan.is_late(*key) for key in there]
    assert sum(flags) == plan.late
    for count in range(len(there)):
        assert abs(sum(flags[:count]) - plan.late * count / len(there)) <= 1
    every = [(layer, tile) for layer in range(layers) for tile in range(tiles)]
    assert not any(plan.is_late(*key) for key in set(every) - set(there))
    assert plan.host_bytes == plan.streamed_bytes(tiles) + plan.late_bytes


def write(store, device, number, tiles):
    """Tiles that are computed late."""
    for layer in range(PLAN.layers):
        for tile in range(tiles):
            source = torch.full(SHAPE, float("nan"))
            device.launch("compute a tile", source.fill_, value(number, layer, tile))
            if not store.plan.is_late(layer, tile) and store.plan.is_resident(layer, tile):
                device.finish()  # the store copies at once
            store.write(layer, tile, source).wait()


def value(number, layer, tile):
    return 100.0 * number + 10 * layer + tile


def run(device, plan=PLAN):
    """Two texts, each read, decoded in two passes, with a tile more in the second: sums of all tiles read."""
    store = TileStore(plan, torch.float32, device)
    stream, sums = TileStream(store, device, torch.float32), []

    def read(tiles):
        stream.begin(tiles)
        for layer in range(PLAN.layers):
            for tile in stream.tiles(layer):
                device.launch("add a tile up", lambda tile: sums.append(tile.kv.sum()), tile)
        device.finish()

    try:
        for number in (1, 2):
            store.give_up()
            write(store, device, number, PLAN.tiles - 1)
            store.bring_up(PLAN.tiles - 1)
            read(PLAN.tiles - 1)
            for layer in range(PLAN.layers):
                last = PLAN.tiles - 1
                store.write(layer, last, torch.full(SHAPE, value(number, layer, last))).wait()
            read(PLAN.tiles)
    finally:
        device.close()
        store.close()
    return [float(each) for each in sums]


def expected():
    sums = []
    for number in (1, 2):
        for tiles in (PLAN.tiles - 1, PLAN.tiles):
            sums += [24 * value(number, layer, tile) for layer in range(PLAN.layers) for tile in range(tiles)]
    return sums


@pytest.mark.parametrize("name", DEVICES)
def test_two_texts_on_every_device(name):
    assert run(DEVICES[name]()) == expected()
    assert run(DEVICES[name](), ALL_RESIDENT) == expected()


@pytest.mark.parametrize("seed", range(20))
def test_right_under_any_delays(seed):
    assert run(chaotic(seed, longest_ms=0.5)) == expected()


class _NoWait:
    def wait(self):
        pass


def _arrivals_not_awaited(monkeypatch, device):
    submit, bring_up = device.incoming.submit, late.LateTiles.bring_up

    def mutated(self, host, tiles):
        device.incoming.submit = lambda *args, **others: submit(*args, **others) and _NoWait()
        bring_up(self, host, tiles)
        device.incoming.submit = submit

    monkeypatch.setattr(late.LateTiles, "bring_up", mutated)


def _not_given_up(monkeypatch, device):
    """A second text finds the first one's tiles."""
    monkeypatch.setattr(late.LateTiles, "give_up", lambda self: None)
    monkeypatch.setattr(late.LateTiles, "write", lambda self, key, kv: None)


def _not_written_while_up(monkeypatch, device):
    """What is written later only goes to host memory, but counts as being there."""

    def mutated(self, key, kv):
        if key in self._room:
            self.places[key] = self._room[key]

    monkeypatch.setattr(late.LateTiles, "write", mutated)


@pytest.mark.parametrize(
    "mutation",
    [_arrivals_not_awaited, _not_given_up, _not_written_while_up],
    ids=lambda mutation: mutation.__name__.strip("_"),
)
def test_a_missing_wait_shows(mutation):
    def wrong(seed, plan):
        device = chaotic(seed, longest_ms=2)
        with pytest.MonkeyPatch.context() as patch:
            mutation(patch, device)
            return run(device, plan) != expected()

    # Copies of one direction keep their order: whoever waits for a streamed tile waits for all that came up before.
    assert any(wrong(seed, plan) for seed in range(200) for plan in (PLAN, ALL_RESIDENT))


def counted(device=None):
    device = device or EagerDevice()
    store = TileStore(PLAN, torch.float32, device)
    write(store, device, 1, 4)
    return device, store


def test_they_come_up_once_and_are_not_streamed_then():
    device, store = counted()
    late_ones = [key for key in PLAN.resident_tiles() if PLAN.is_late(*key)]
    written = sum(key[1] < 4 for key in late_ones)
    assert sorted({*store.stream_order(4)} - {*PLAN.stream_order(4)}) == [key for key in late_ones if key[1] < 4]
    assert device.incoming.moved == 0
    for _ in range(2):  # a second time there is nothing left to bring up
        store.bring_up(4)
        assert device.incoming.moved == store.late.moved == written * PLAN.tile_bytes
        assert list(store.stream_order(4)) == list(PLAN.stream_order(4))
    store.give_up()
    store.bring_up(4)
    assert store.late.moved == 2 * written * PLAN.tile_bytes


def test_all_of_them_lie_in_host_memory_all_along():
    """So they may be given up in the middle of a text."""
    _, store = counted()
    store.bring_up(4)
    for layer in range(PLAN.layers):
        store.write(layer, 4, torch.full(SHAPE, value(1, layer, 4)))
    before = [store.place(*key).clone() for key in PLAN.resident_tiles()]
    store.give_up()
    assert not store.late.places
    for key, kv in zip(PLAN.resident_tiles(), before, strict=True):
        assert torch.equal(store.place(*key), kv)


def test_they_are_allocated_in_blocks_when_they_come_up_and_reclaimed(monkeypatch):
    monkeypatch.setattr(late, "BLOCK_BYTES", 3 * PLAN.tile_bytes)
    made, reclaimed = [], []

    class Device(EagerDevice):
        def empty(self, shape, dtype):
            made.append(shape)
            return super().empty(shape, dtype)

        def reclaim(self):
            reclaimed.append(len(made))

    _, store = counted(Device())
    assert made == [(2, *SHAPE)], "of six resident tiles, two are early"
    store.bring_up(4)
    assert made[1:] == [(3, *SHAPE), (1, *SHAPE)]
    store.give_up()
    store.give_up()
    assert reclaimed == [1, 3], "before they are allocated, and when they are given up"


def test_where_memory_is_short_the_rest_is_streamed(monkeypatch):
    monkeypatch.setattr(late, "BLOCK_BYTES", PLAN.tile_bytes)

    class Device(EagerDevice):
        left = 2 + 1  # early tiles and two late ones

        def empty(self, shape, dtype):
            if not self.left:
                raise torch.OutOfMemoryError("full")
            self.left -= 1
            return super().empty(shape, dtype)

    _, store = counted(Device())
    with pytest.warns(RuntimeWarning, match="less room for resident tiles than planned"):
        store.bring_up(4)
    there = [key for key in PLAN.resident_tiles() if PLAN.is_late(*key) and store.is_resident(*key)]
    assert len(there) == store.late.moved // PLAN.tile_bytes == 1, "the other has room and holds nothing yet"
    assert len(list(store.stream_order(4))) == len(list(PLAN.stream_order(4))) + sum(
        PLAN.is_late(layer, tile) and (layer, tile) not in there for layer in range(2) for tile in range(4)
    )
    for layer in range(2):
        for tile in range(4):
            assert float(store.place(layer, tile).sum()) == 24 * value(1, layer, tile)


def test_without_late_tiles_nothing_is_reclaimed(monkeypatch):
    store = TileStore(replace(PLAN, late=0), torch.float32, EagerDevice())
    monkeypatch.setattr(EagerDevice, "reclaim", lambda self: pytest.fail("waits for the device"))
    store.bring_up(4)
    store.give_up()
