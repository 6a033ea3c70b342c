"""Pinning in the background: in order, awaited where needed, refused in one sentence, undone at the end."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from offload_triforce.errors import MemoryLimitError
from offload_triforce.scheduler import pinning
from offload_triforce.scheduler.pinning import Pinner, cuda_pin

pytestmark = pytest.mark.timeout(20)
SLABS = [torch.zeros(n, dtype=torch.uint8) for n in (10, 20, 30)]


def nothing(*_):
    pass


def test_in_order_and_with_progress():
    pinned, told = [], []
    pinner = Pinner(SLABS, lambda slab: pinned.append(slab.numel()), nothing, lambda *so_far: told.append(so_far))
    pinner.wait(2)
    pinner.close()
    assert pinned == [10, 20, 30]
    assert told == [(10, 60), (30, 60), (60, 60)]


def test_a_slab_is_awaited_and_later_ones_are_not():
    gate, pinned = threading.Event(), []

    def pin(slab):
        if slab.numel() == 30:
            gate.wait()
        pinned.append(slab.numel())

    pinner = Pinner(SLABS, pin, nothing, nothing)
    pinner.wait(1)
    assert pinned[:2] == [10, 20]
    gate.set()
    pinner.wait(2)
    assert pinned == [10, 20, 30]
    pinner.close()


def test_refusal_is_raised_where_it_matters_and_what_was_pinned_is_unpinned():
    unpinned = []

    def pin(slab):
        if slab.numel() == 20:
            raise MemoryLimitError("no more")

    pinner = Pinner(SLABS, pin, lambda slab: unpinned.append(slab.numel()), nothing)
    errors = []
    for slab in (1, 2):
        with pytest.raises(MemoryLimitError, match="no more") as error:
            pinner.wait(slab)
        errors.append(error.value)
    assert errors[0] is not errors[1], "an error that is kept would keep alive the frames that it went through"
    pinner.close()
    assert unpinned == [10]


def test_close_stops_early():
    """Ctrl-C in the first second does not wait for half a minute of pinning."""
    started, gate, pinned = threading.Event(), threading.Event(), []

    def pin(slab):
        started.set()
        gate.wait()
        pinned.append(slab.numel())

    unpinned = []
    pinner = Pinner(SLABS, pin, lambda slab: unpinned.append(slab.numel()), nothing)
    started.wait()
    threading.Timer(0.05, gate.set).start()
    pinner.close()
    assert pinned == unpinned == [10]
    pinner.close()
    assert unpinned == [10]


def test_what_cuda_says_becomes_a_sentence(monkeypatch):
    runtime = SimpleNamespace(cudaHostRegister=lambda pointer, size, flags: 2)
    current = []
    monkeypatch.setattr(pinning.torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(pinning.torch.cuda, "device", lambda device: current.append(device) or nullcontext())
    with pytest.raises(MemoryLimitError, match=r"not be pinned \(CUDA error 2\); raise the limit on locked memory"):
        cuda_pin(SLABS[0], torch.device("cuda", 1))
    assert current == [torch.device("cuda", 1)]
