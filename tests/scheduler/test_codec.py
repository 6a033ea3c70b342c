"""Tiles that lie coded: the same bits back by every way, fewer bytes on the link, and raw where they do not fit."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch

from offload_triforce.errors import MemoryLimitError
from offload_triforce.scheduler.codec import fits
from offload_triforce.scheduler.pipeline import TileStream
from offload_triforce.scheduler.plan import TilePlan, aligned
from offload_triforce.scheduler.store import Leaving, TileStore
from tests.coded_tiles import coded, wild
from tests.scheduler.devices import DEVICES, EagerDevice, LateDevice, chaotic

DTYPES = [torch.bfloat16, torch.float16]
SHAPE = (2, 2, 64, 32)


def make_plan(dtype=torch.bfloat16, **changes):
    return coded(replace(TilePlan(2, 2, 32, 2, tile_tokens=64, tiles=4, ring=2), **changes), dtype)


def tame(number, dtype=torch.bfloat16):
    """A tile that fits."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(number)).to(dtype)


def make(device, plan=None, dtype=torch.bfloat16, **others):
    plan = plan or make_plan(dtype)
    store = TileStore(plan, dtype, device, **others)
    return store, TileStream(store, device, dtype)


def read(device, store, stream, tiles=4):
    """All tiles of a pass."""
    seen = []
    stream.begin(tiles)
    for layer in range(store.plan.layers):
        for tile in stream.tiles(layer):
            device.launch("look", lambda tile: seen.append(tile.kv.clone()), tile)
    device.finish()
    return seen


def same(one, other):
    return torch.equal(one.contiguous().view(torch.int16), other.contiguous().view(torch.int16))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wild_ones", [(), (0, 3, 4), range(8)], ids=["none", "some", "all"])
@pytest.mark.parametrize("ring", [1, 3])
def test_all_bits_come_back(device, dtype, wild_ones, ring):
    """By a pass, to the device alone, and to the host; and of tiles that were put there by the host."""
    device = DEVICES[device]()
    store, stream = make(device, make_plan(dtype, ring=ring, resident=0.3), dtype)
    keys = [(layer, tile) for layer in range(2) for tile in range(4)]
    held = [wild(SHAPE, dtype, n) if n in wild_ones else tame(n, dtype) for n in range(8)]
    for number in range(2):
        for key, kv in zip(keys, held, strict=True):
            if number:
                store.put(*key, kv)
            else:
                store.write(*key, kv).wait()
        for _ in range(2):
            assert all(map(same, read(device, store, stream), held))
        assert all(same(store.fetch(*key), kv) for key, kv in zip(keys, held, strict=True))
        assert all(same(store.read(*key), kv) for key, kv in zip(keys, held, strict=True))
        held = held[1:] + held[:1]
    device.close()


def test_what_crosses_the_link_is_counted():
    device = EagerDevice()
    store, stream = make(device)
    plan = store.plan
    assert plan.wire_ratio > 1.3
    for n in range(8):
        store.write(n // 4, n % 4, tame(n)).wait()
    assert device.outgoing.moved == plan.host_bytes == 8 * plan.wire_bytes
    assert store.saved == 8 * (plan.tile_bytes - plan.wire_bytes)
    read(device, store, stream)
    assert device.incoming.moved == plan.streamed_bytes(4) == 8 * plan.wire_bytes
    store.write(0, 1, wild(SHAPE, torch.bfloat16)).wait()
    assert device.outgoing.moved == 9 * plan.wire_bytes + plan.tile_bytes, "coded in vain, and then as it is"
    before, saved = device.incoming.moved, store.saved
    read(device, store, stream)
    assert device.incoming.moved - before == 7 * plan.wire_bytes + plan.tile_bytes
    assert store.saved - saved == 7 * (plan.tile_bytes - plan.wire_bytes)


def test_device_memory_is_what_the_plan_says():
    made = []

    class Counting(EagerDevice):
        def empty(self, shape, dtype):
            made.append(super().empty(shape, dtype))
            return made[-1]

    for ring in (1, 4):
        made.clear()
        plan = make(Counting(), make_plan(ring=ring, resident=0.5))[0].plan
        assert sum(part.nbytes for part in made) == plan.ring_bytes + plan.coding_bytes + plan.resident_bytes
        assert plan.ring_bytes == max(ring * plan.wire_bytes, aligned(plan.tile_bytes))


def test_a_tile_written_anew_is_coded_again():
    store, stream = make(EagerDevice())
    store.write(0, 0, wild(SHAPE, torch.bfloat16)).wait()
    assert store.source(0, 0).dtype == torch.bfloat16
    store.write(0, 0, tame(1)).wait()
    assert store.source(0, 0).dtype == torch.uint8
    assert same(read(store._device, store, stream, 1)[0], tame(1))


def test_of_two_writes_the_later_one_counts():
    """Whoever wrote a tile first may settle it last; what it would say is of the other's bytes."""
    for first, second in ((tame(1), wild(SHAPE, torch.bfloat16)), (wild(SHAPE, torch.bfloat16), tame(1))):
        store, _ = make(LateDevice())
        earlier, later = store.write(0, 0, first), store.write(0, 0, second)
        later.wait()
        first.zero_()
        earlier.wait()
        assert same(store.read(0, 0), second)


def test_without_host_memory_for_a_raw_tile_it_can_be_tried_again():
    free = [100]
    store, _ = make(EagerDevice(), free=lambda: free[0])
    kv, leaving = wild(SHAPE, torch.bfloat16), Leaving()
    leaving.add(0, store.write(0, 0, kv))
    for _ in range(2):
        with pytest.raises(MemoryLimitError, match=r"takes 0.0 MB of host memory as it is, where 0.0 MB are free"):
            leaving.wait()
    free[0] = 10**6
    leaving.wait()
    assert same(store.read(0, 0), kv)
    free[0] = 0
    with pytest.raises(MemoryLimitError, match="free some memory"):
        store.put(0, 1, kv)


def test_what_is_forgotten_holds_no_memory():
    """An interrupted prefill's buffer is gone when its copies have landed, however they would have been settled."""
    device = LateDevice()
    store, _ = make(device)
    kv, leaving = wild(SHAPE, torch.bfloat16), Leaving()
    leaving.add(0, store.write(0, 0, kv))
    gone = weakref.ref(kv)
    del kv
    leaving.forget()
    assert device.outgoing.started == 1
    device.outgoing.submitted.clear()
    device.outgoing.beside.clear()
    assert gone() is None
    assert store.source(0, 0).dtype == torch.uint8


@pytest.mark.parametrize("device", DEVICES)
def test_late_tiles_come_up_decoded(device):
    device = DEVICES[device]()
    store, stream = make(device, make_plan(resident=0.75, late=4))
    held = [wild(SHAPE, torch.bfloat16, n) if n % 3 == 0 else tame(n) for n in range(8)]
    for n, kv in enumerate(held):
        store.write(n // 4, n % 4, kv).wait()
    late = [n for n in range(8) if store.plan.is_late(n // 4, n % 4)]
    crosses = sum(store.source(n // 4, n % 4).nbytes for n in late)
    for _ in range(2):
        store.bring_up(4)
        assert all(map(same, read(device, store, stream), held))
        store.give_up()
    assert store.late.moved == 2 * crosses
    device.close()


@pytest.mark.parametrize("seed", range(10))
def test_so_they_do_under_any_delays(seed):
    device = chaotic(seed, longest_ms=1)
    store, stream = make(device, make_plan(resident=1.0, late=8))
    for n in range(8):
        store.write(n // 4, n % 4, tame(n)).wait()
    store.bring_up(4)
    assert all(same(kv, tame(n)) for n, kv in enumerate(read(device, store, stream)))
    device.close()


def test_late_tiles_decoded_beside_the_lane_show(monkeypatch):
    """The mutation: they are decoded when they are asked for, and not when they have landed."""

    def mutated(seed):
        device = chaotic(seed, longest_ms=1)
        submit = device.incoming.submit

        def early(target, source, after=None, first=None, then=None):
            if then is not None:
                then()
            return submit(target, source, after, first)

        store, stream = make(device, make_plan(resident=1.0, late=8))
        for n in range(8):
            store.write(n // 4, n % 4, tame(n)).wait()
        device.incoming.submit = early
        store.bring_up(4)
        right = all(same(kv, tame(n)) for n, kv in enumerate(read(device, store, stream)))
        device.close()
        return not right

    assert any(mutated(seed) for seed in range(3))


def test_fits_reads_the_header():
    place = torch.zeros(512, dtype=torch.uint8)
    assert fits(place)
    for byte in range(4):
        place.zero_()[byte] = 1
        assert not fits(place)
