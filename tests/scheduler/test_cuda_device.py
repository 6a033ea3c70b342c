"""The CUDA device's streams and events: right in every order that CUDA allows, and no host that waits."""

from __future__ import annotations

import pytest
import torch

from offload_triforce.scheduler.device import CudaDevice, CudaLane
from offload_triforce.scheduler.pipeline import TileStream
from offload_triforce.scheduler.plan import TilePlan
from offload_triforce.scheduler.store import TileStore
from offload_triforce.scheduler.trace import Trace
from tests.scheduler.fake_cuda import FakeCuda, FakeCudaDevice
from tests.scheduler.test_chaos import EXPECTED, KINDS, run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(30))
def test_right_in_every_order(monkeypatch, seed, kind):
    cuda = FakeCuda(monkeypatch, seed)
    assert run(FakeCudaDevice(cuda), kind) == EXPECTED[kind]


def _copies_do_not_wait(monkeypatch):
    submit = CudaLane.submit

    def mutated(self, target, source, after=None, **beside):
        return submit(self, target, source, **beside)

    monkeypatch.setattr(CudaLane, "submit", mutated)


def _events_recorded_before_the_copy(monkeypatch):
    submit = CudaLane.submit

    def mutated(self, target, source, after=None, **beside):
        landed = self._stream.record_event(torch.cuda.Event(enable_timing=True))
        copy = submit(self, target, source, after, **beside)
        copy.event = landed
        return copy

    monkeypatch.setattr(CudaLane, "submit", mutated)


def _releases_mean_nothing(monkeypatch):
    def mutated(self, buffer):
        event = self.record()
        event.event.over = True
        return event

    monkeypatch.setattr(CudaDevice, "release", mutated)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mutation", [_copies_do_not_wait, _events_recorded_before_the_copy, _releases_mean_nothing])
def test_a_missing_event_shows(monkeypatch, mutation, kind):
    mutation(monkeypatch)

    def wrong(seed):
        with monkeypatch.context() as patch:
            return run(FakeCudaDevice(FakeCuda(patch, seed)), kind) != EXPECTED[kind]

    assert any(wrong(seed) for seed in range(20))


def test_a_pass_synchronizes_nothing(monkeypatch):
    """Streams wait for each other; the host issues the whole pass, write-back included, and goes on."""
    cuda = FakeCuda(monkeypatch, 0)
    device = FakeCudaDevice(cuda)
    plan = TilePlan(3, 2, 4, 4, tile_tokens=3, tiles=6, ring=2, resident=0.3)
    store = TileStore(plan, torch.float32, device)
    stream = TileStream(store, device, torch.float32)
    for layer in range(3):
        for tile in range(6):
            store.write(layer, tile, torch.ones(2, 2, 3, 4))
    stream.begin(6)
    for layer in range(3):
        for tile in stream.tiles(layer):
            device.launch("read", tile.kv.sum)
    store.write(0, 5, torch.zeros(2, 2, 3, 4)).wait()
    assert cuda.synchronizations == 0
    assert sum(len(s.queue) for s in cuda.streams) > 50, "nothing has run yet"
    device.close()
    assert cuda.synchronizations == 2


def test_trace_spans(monkeypatch):
    cuda = FakeCuda(monkeypatch, 0)
    trace = Trace()
    device = FakeCudaDevice(cuda, trace)
    device.incoming.submit(torch.zeros(5), torch.ones(5))
    with device.span("compute", "something"):
        pass
    device.close()
    assert [(span.track, span.size) for span in trace.spans()] == [("host to device", 20), ("compute", 0)]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_right_on_cuda(kind):
    device = CudaDevice(torch.device("cuda"), Trace())
    assert run(device, kind, "cuda") == EXPECTED[kind]
    assert {span.track for span in device.trace.spans()} == {"compute", "host to device", "device to host"}
