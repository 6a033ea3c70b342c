"""The order of things under adversarial delays: right with every wait in place, wrong with any of them removed.

Computation and copies run on threads of their own, each late by a random time, over buffers that are full of NaN
until a copy has landed. A mutation takes one wait out; at least one seed must then show wrong numbers.
"""

from __future__ import annotations

import pytest
import torch

from offload_triforce.scheduler import pipeline
from offload_triforce.scheduler.pipeline import TileStream
from offload_triforce.scheduler.plan import TilePlan
from offload_triforce.scheduler.store import Leaving, TileStore
from tests.scheduler.devices import EagerDevice, chaotic

SEEDS = range(12)
PLAN = TilePlan(2, 1, 4, 4, tile_tokens=3, tiles=5, ring=2, resident=0.2)
SHAPE = (2, 1, 3, 4)


def run(device, where="cpu"):
    """Write tiles that are computed late, read them in two passes, write again, read again: sums of all tiles read."""
    store = TileStore(PLAN, torch.float32, device)
    stream = TileStream(store, device, torch.float32)
    sources = [torch.zeros(SHAPE, device=where) for _ in range(2)]  # used in turn, as the prefill uses its one buffer
    sums = []

    def write_all(number):
        for layer in range(PLAN.layers):
            leaving = [Leaving(), Leaving()]
            for tile in range(PLAN.tiles):
                source, earlier = sources[tile % 2], leaving[tile % 2]
                earlier.wait()
                value = 100.0 * number + 10 * layer + tile
                device.launch("compute a tile", source.fill_, value)
                if PLAN.is_resident(layer, tile):
                    device.finish()
                earlier.add(0, store.write(layer, tile, source))
            for each in leaving:
                each.wait()

    def read_all():
        stream.begin(PLAN.tiles)
        for layer in range(PLAN.layers):
            for tile in stream.tiles(layer):
                device.launch("add a tile up", lambda tile: sums.append(tile.kv.sum()), tile)

    try:
        for number in (1, 2):
            write_all(number)
            read_all()
            read_all()
            device.finish()
    finally:
        device.close()
        store.close()
    return [float(each) for each in sums]


EXPECTED = run(EagerDevice())


def test_expected_numbers():
    one = [24.0 * (100 + 10 * layer + tile) for layer in range(2) for tile in range(5)]
    assert one * 2 + [number + 2400 for number in one] * 2 == EXPECTED


@pytest.mark.parametrize("seed", range(40))
def test_right_under_any_delays(seed):
    assert run(chaotic(seed, longest_ms=0.5)) == EXPECTED


class _NoWait:
    def __init__(self, event):
        self.event = event

    def wait(self):
        pass


def _arrivals_not_awaited(monkeypatch):
    """Computation on a slot does not wait for its copy."""
    run_ahead = TileStream._run_ahead

    def mutated(self):
        before = len(self._flying)
        run_ahead(self)
        for i in range(before, len(self._flying)):
            self._flying[i] = (self._flying[i][0], _NoWait(self._flying[i][1]))

    monkeypatch.setattr(TileStream, "_run_ahead", mutated)


def _ignores_after(lane):
    """A lane whose copies wait for nothing but each other."""
    submit = lane.submit
    lane.submit = lambda target, source, after=None: submit(target, source)


def _slots_overwritten_at_once(device):
    _ignores_after(device.incoming)


def _tiles_leave_before_they_are_computed(device):
    _ignores_after(device.outgoing)


def _sources_overwritten_at_once(monkeypatch):
    monkeypatch.setattr(Leaving, "wait", lambda self, end=None: None)


def _pass_begins_without_a_look_back(monkeypatch):
    """The first copies of a pass do not wait for what still reads the ring."""
    begin = TileStream.begin

    def mutated(self, tiles):
        record, self.device.record = self.device.record, lambda: None
        begin(self, tiles)
        self.device.record = record

    monkeypatch.setattr(TileStream, "begin", mutated)


def _slot_released_before_its_use(monkeypatch):
    def tiles(self, layer):
        for index in range(self._tiles):
            if self.plan.is_resident(layer, index):
                yield pipeline.Tile(index, self.store.place(layer, index))
                continue
            slot, landed = self._flying.popleft()
            landed.wait()
            self._free.append((slot, self.device.release(self._ring[slot])))
            self._run_ahead()
            yield pipeline.Tile(index, self._ring[slot])

    monkeypatch.setattr(TileStream, "tiles", tiles)


MUTATIONS = [_arrivals_not_awaited, _sources_overwritten_at_once, _pass_begins_without_a_look_back]
MUTATIONS += [_slot_released_before_its_use]


def _wrong(device):
    try:
        sums = run(device)
    except RuntimeError:
        return True
    return sums != EXPECTED  # NaN differs from everything


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__.strip("_"))
def test_a_missing_wait_shows(monkeypatch, mutation):
    mutation(monkeypatch)
    assert any(_wrong(chaotic(seed, longest_ms=1)) for seed in SEEDS)


@pytest.mark.parametrize(
    "mutation",
    [_slots_overwritten_at_once, _tiles_leave_before_they_are_computed],
    ids=lambda mutation: mutation.__name__.strip("_"),
)
def test_a_copy_that_does_not_wait_shows(mutation):
    def mutated(seed):
        device = chaotic(seed, longest_ms=1)
        mutation(device)
        return device

    assert any(_wrong(mutated(seed)) for seed in SEEDS)
