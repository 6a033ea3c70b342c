"""The order of things under adversarial delays: right with every wait in place, wrong with any of them removed.

Computation and copies run on threads of their own, each late by a random time, over buffers that are full of NaN
until a copy has landed. A mutation takes one wait out; at least one seed must then show wrong numbers.

Tiles cross the link raw or coded; of those that are coded, every third does not fit and goes raw.
"""

from __future__ import annotations

import pytest
import torch

from offload_triforce.scheduler import codec, pipeline
from offload_triforce.scheduler.pipeline import TileStream
from offload_triforce.scheduler.plan import TilePlan
from offload_triforce.scheduler.store import Leaving, TileStore
from tests.coded_tiles import bits, coded, wild
from tests.scheduler.devices import EagerDevice, chaotic

SEEDS = range(12)
RAW = TilePlan(2, 1, 4, 4, tile_tokens=3, tiles=5, ring=2, resident=0.2)
CODED = coded(TilePlan(2, 1, 32, 2, tile_tokens=64, tiles=5, ring=2, resident=0.2), torch.bfloat16)
KINDS = {"raw": (RAW, torch.float32), "coded": (CODED, torch.bfloat16)}


def content(plan, dtype, number, layer, tile):
    """What a tile holds."""
    shape = (2, plan.kv_heads, plan.tile_tokens, plan.head_dim)
    if plan.coded_bytes and (number + layer + tile) % 3 == 0:
        return wild(shape, dtype, 100 * number + 10 * layer + tile)
    return torch.full(shape, 100.0 * number + 10 * layer + tile, dtype=dtype)


def run(device, kind="raw", where="cpu"):
    """Write tiles that are computed late, read them in two passes, write again, read again: sums of all tiles read."""
    plan, dtype = KINDS[kind]
    store = TileStore(plan, dtype, device)
    stream = TileStream(store, device, dtype)
    # Used in turn, as the prefill uses its one buffer.
    sources = [torch.zeros_like(content(plan, dtype, 0, 0, 0), device=where) for _ in range(2)]
    sums = []

    def write_all(number):
        for layer in range(plan.layers):
            leaving = [Leaving(), Leaving()]
            for tile in range(plan.tiles):
                source, earlier = sources[tile % 2], leaving[tile % 2]
                earlier.wait()
                device.launch("compute a tile", source.copy_, content(plan, dtype, number, layer, tile))
                if plan.is_resident(layer, tile):
                    device.finish()
                earlier.add(0, store.write(layer, tile, source))
            for each in leaving:
                each.wait()

    def read_all():
        stream.begin(plan.tiles)
        for layer in range(plan.layers):
            for tile in stream.tiles(layer):
                device.launch("add a tile up", lambda tile: sums.append(bits(tile.kv)), tile)

    try:
        for number in (1, 2):
            write_all(number)
            read_all()
            read_all()
            device.finish()
            stream.slack()
    finally:
        device.close()
        store.close()
    return [float(each) for each in sums]


EXPECTED = {kind: run(EagerDevice(), kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_expected_numbers(kind):
    def read(number):
        return [float(bits(content(*KINDS[kind], number, layer, tile))) for layer in range(2) for tile in range(5)]

    assert read(1) * 2 + read(2) * 2 == EXPECTED[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(40))
def test_right_under_any_delays(seed, kind):
    assert run(chaotic(seed, longest_ms=0.5), kind) == EXPECTED[kind]


class _NoWait:
    def __init__(self, event=None):
        self.event = event

    def wait(self):
        pass

    reach = wait


def _arrivals_not_awaited(monkeypatch):
    """Computation on a slot does not wait for its copy."""
    run_ahead = TileStream._run_ahead

    def mutated(self):
        before = len(self._flying)
        run_ahead(self)
        for i in range(before, len(self._flying)):
            *where, landed = self._flying[i]
            self._flying[i] = (*where, _NoWait(landed))

    monkeypatch.setattr(TileStream, "_run_ahead", mutated)


def _ignores_after(lane):
    """A lane whose copies wait for nothing but each other."""
    submit = lane.submit
    lane.submit = lambda target, source, after=None, first=None, then=None: submit(target, source, None, first, then)


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
            region, kv, landed = self._flying.popleft()
            landed.wait()
            self._give_back(region)
            if kv.dtype == torch.uint8:
                self.device.launch("decode", self.store.decode, kv, self._decoded)
            yield pipeline.Tile(index, self._decoded if kv.dtype == torch.uint8 else kv)

    monkeypatch.setattr(TileStream, "tiles", tiles)


def _decoded_out_of_turn(monkeypatch):
    """The next tile is decoded over one that is still being attended to."""
    tiles = TileStream.tiles

    def mutated(self, layer):
        launch = self.device.launch
        self.device.launch = lambda name, work, *args: work(*args) if "decode" in name else launch(name, work, *args)
        try:
            yield from _with(tiles(self, layer), self.device, launch)
        finally:
            self.device.launch = launch

    def _with(items, device, launch):
        mutated_launch = device.launch
        for item in items:
            device.launch = launch
            yield item
            device.launch = mutated_launch

    monkeypatch.setattr(TileStream, "tiles", mutated)


def _fit_is_not_settled(monkeypatch):
    """What does not fit counts as coded."""
    monkeypatch.setattr(codec._Written, "wait", lambda self: self._landed.wait())


MUTATIONS = [_arrivals_not_awaited, _sources_overwritten_at_once, _pass_begins_without_a_look_back]
MUTATIONS += [_slot_released_before_its_use]
CASES = [(mutation, kind) for mutation in MUTATIONS for kind in KINDS]
CASES += [(mutation, "coded") for mutation in (_decoded_out_of_turn, _fit_is_not_settled)]


def _wrong(device, kind):
    try:
        sums = run(device, kind)
    except RuntimeError:
        return True
    return sums != EXPECTED[kind]


@pytest.mark.parametrize(("mutation", "kind"), CASES, ids=lambda part: getattr(part, "__name__", part).strip("_"))
def test_a_missing_wait_shows(monkeypatch, mutation, kind):
    mutation(monkeypatch)
    assert any(_wrong(chaotic(seed, longest_ms=1), kind) for seed in range(200))


def _coded_out_of_turn(device):
    """Tiles are coded when they are handed over: they may not be computed yet, or others be on their way there."""
    submit = device.outgoing.submit

    def mutated(target, source, after=None, first=None, then=None):
        if first is not None:
            first()
        return submit(target, source, after, None, then)

    device.outgoing.submit = mutated


def _raw_ones_overwritten_at_once(device):
    """What does not fit leaves raw, and nobody waits for that."""
    submit = device.outgoing.submit

    def mutated(target, source, after=None, first=None, then=None):
        landed = submit(target, source, after, first, then)
        return landed if first is not None else _NoWait()

    device.outgoing.submit = mutated


def _fit_is_read_before_it_has_landed(device):
    submit = device.outgoing.submit

    def mutated(target, source, after=None, first=None, then=None):
        landed = submit(target, source, after, first, then)
        return landed if first is None else _NoWait()

    device.outgoing.submit = mutated


COPIES = [_slots_overwritten_at_once, _tiles_leave_before_they_are_computed]
COPY_CASES = [(mutation, kind) for mutation in COPIES for kind in KINDS]
OF_CODING = [_coded_out_of_turn, _raw_ones_overwritten_at_once, _fit_is_read_before_it_has_landed]
COPY_CASES += [(mutation, "coded") for mutation in OF_CODING]


@pytest.mark.parametrize(("mutation", "kind"), COPY_CASES, ids=lambda part: getattr(part, "__name__", part).strip("_"))
def test_a_copy_that_does_not_wait_shows(mutation, kind):
    def mutated(seed):
        device = chaotic(seed, longest_ms=1)
        mutation(device)
        return device

    assert any(_wrong(mutated(seed), kind) for seed in range(200))
