"""Small tensors on their way to the device: behind no tile, and whole, however late the device comes to read them."""

from __future__ import annotations

import random

import pytest
import torch

from offload_triforce.kernels import ops
from offload_triforce.scheduler.device import to_device
from offload_triforce.scheduler.emulated import EmulatedDevice
from offload_triforce.scheduler.staging import Staging

CPU = torch.device("cpu")


class Late:
    """A device that does what it is given later: when somebody waits for it, and at random."""

    def __init__(self, monkeypatch, seed):
        self.queue, self.done, self.given, self.chance = [], 0, 0, random.Random(seed)
        monkeypatch.setattr(ops, "fetch", lambda target, source: self.give(lambda: target.copy_(source)))

    def give(self, work):
        self.queue.append(work)
        self.given += 1
        while self.queue and self.chance.random() < 0.3:
            self.work()

    def work(self):
        self.queue.pop(0)()
        self.done += 1

    def record(self):
        return Point(self, self.given)


class Point:
    def __init__(self, device, number):
        self.device, self.number = device, number

    def synchronize(self):
        while self.device.done < self.number:
            self.device.work()


def tensors(seed, count=40):
    chance = torch.Generator().manual_seed(seed)
    for number in range(count):
        dtype = (torch.int64, torch.bool, torch.float32)[number % 3]
        yield torch.randint(0, 2, (number % 5, 3), generator=chance).to(dtype)


def brought(monkeypatch, seed):
    """What arrives of small tensors through three slots, and what was sent."""
    device = Late(monkeypatch, seed)
    staging = Staging(CPU, torch.zeros(3, 256, dtype=torch.uint8), device.record)
    sent = list(tensors(seed))
    arrived = [staging.bring(tensor) for tensor in sent]
    while device.queue:
        device.work()
    return all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(arrived, sent, strict=True))


@pytest.mark.parametrize("seed", range(10))
def test_what_is_sent_arrives(monkeypatch, seed):
    assert brought(monkeypatch, seed)


def test_a_slot_that_nobody_waits_for_shows(monkeypatch):
    monkeypatch.setattr(Point, "synchronize", lambda self: None)
    assert not any(brought(monkeypatch, seed) for seed in range(10))


def test_what_does_not_fit_is_not_taken():
    staging = Staging(CPU, torch.zeros(3, 256, dtype=torch.uint8), lambda: None)
    assert staging.takes(torch.zeros(32, dtype=torch.int64))
    assert not staging.takes(torch.zeros(33, dtype=torch.int64))


def test_it_waits_for_no_tile():
    """On the stand-in for a link, with 4 tiles of 100 ms queued: as a copy it would be the last to land."""
    device = EmulatedDevice(gbps=0.01)
    try:
        tiles = [torch.zeros(1_000_000, dtype=torch.uint8) for _ in range(4)]
        landed = [device.incoming.submit(torch.empty_like(tile), tile) for tile in tiles]
        tokens, copied = torch.arange(7), torch.zeros(7, dtype=torch.int64)
        landed.append(device.incoming.submit(copied, tokens))
        moved = device.incoming.moved
        staging = Staging(CPU, torch.zeros(3, 256, dtype=torch.uint8), device.record)
        assert torch.equal(staging.bring(tokens), tokens)
        assert [event.arrived() for event in landed] == [False] * 5
        assert device.incoming.moved == moved
    finally:
        device.close()


def test_on_the_cpu_it_stays_where_it_is():
    tensor = torch.arange(3)
    assert to_device(tensor, CPU) is tensor
