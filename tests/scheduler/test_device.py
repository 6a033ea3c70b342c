"""The thread that plays the link: order, counts, errors, and never faster than it was told to be."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_triforce.scheduler.emulated import EmulatedDevice
from tests.scheduler.devices import chaotic

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def lane():
    device = EmulatedDevice()
    yield device.incoming
    device.close()


def test_copies_run_in_the_order_of_submission(lane):
    """A chain in which every copy reads what the one before it wrote."""
    cells = [torch.full((1000,), float(i)) for i in range(50)]
    copies = [lane.submit(after, before) for before, after in itertools.pairwise(cells)]
    copies[-1].wait()
    assert all(bool((cell == 0).all()) for cell in cells)


def test_waiting_in_any_order_and_twice(lane):
    targets = [torch.zeros(10) for _ in range(5)]
    copies = [lane.submit(target, torch.full((10,), i + 1.0)) for i, target in enumerate(targets)]
    for i in (4, 0, 2, 2):
        copies[i].wait()
        assert torch.equal(targets[i], torch.full((10,), i + 1.0))


def test_copies_between_views(lane):
    """Slices of a buffer, as the tail hands them out: strided on both sides."""
    source, target = torch.arange(24.0).reshape(2, 3, 4), torch.zeros(2, 5, 4)
    lane.submit(target[:, 1:3], source[:, 1:]).wait()
    assert torch.equal(target[:, 1:3], source[:, 1:])
    assert float(target[:, [0, 3, 4]].abs().sum()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
def test_no_copy_starts_a_team_of_threads(lane, monkeypatch, dtype):
    """Nor does one of a strided tile on its way to host memory: the copies are not torch's."""
    monkeypatch.setattr(torch.Tensor, "copy_", None)
    tail = torch.randint(0, 100, (2, 4, 700, 64)).to(dtype)
    target = torch.zeros(2, 4, 512, 64, dtype=dtype)
    for source in (tail[:, :, 100:612], tail[:, :, :512].contiguous()):
        lane.submit(target, source).wait()
        assert torch.equal(target, source)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_moved_counts_bytes(lane, dtype):
    for size in (7, 0, 123):
        lane.submit(torch.zeros(size, dtype=dtype), torch.zeros(size, dtype=dtype)).wait()
    assert lane.moved == 130 * dtype.itemsize


def test_a_failed_copy_raises_where_it_is_waited_for(lane):
    bad = lane.submit(torch.zeros(3), torch.zeros(4))
    target = torch.zeros(3)
    good = lane.submit(target, torch.ones(3))
    good.wait()
    assert torch.equal(target, torch.ones(3)), "the lane goes on after a failure"
    with pytest.raises(RuntimeError, match="copy over the link failed") as caught:
        bad.wait()
    assert isinstance(caught.value.__cause__, RuntimeError)


@given(st.lists(st.integers(0, 20_000), min_size=1, max_size=8))
@settings(deadline=None, max_examples=10)
def test_emulated_link_is_never_faster_than_its_bandwidth(sizes):
    """A lower bound only: how late a machine wakes up is no business of a test."""
    gbps = 0.01
    device = EmulatedDevice(gbps)
    lane = device.incoming
    started = time.perf_counter()
    copies = [lane.submit(torch.empty(n, dtype=torch.uint8), torch.zeros(n, dtype=torch.uint8)) for n in sizes]
    for done, copy in enumerate(copies, start=1):
        copy.wait()
        assert time.perf_counter() - started >= sum(sizes[:done]) / (gbps * 1e9)
    device.close()


def test_idle_time_is_not_saved_up():
    """A link that has stood still is no faster afterwards."""
    device = EmulatedDevice(gbps=0.01)
    lane = device.incoming
    source, target = torch.zeros(200_000, dtype=torch.uint8), torch.zeros(200_000, dtype=torch.uint8)
    lane.submit(target, source).wait()
    time.sleep(0.1)
    started = time.perf_counter()
    lane.submit(target, source).wait()
    assert time.perf_counter() - started >= 0.02
    device.close()


def test_close_drops_what_has_not_begun():
    """Fifty copies of a tenth of a second: close comes long before the last."""
    device = EmulatedDevice(gbps=0.01)
    lane = device.incoming
    targets = [torch.zeros(1_000_000, dtype=torch.uint8) for _ in range(50)]
    for target in targets:
        lane.submit(target, torch.ones_like(target))
    device.close()
    assert int(targets[-1].sum()) == 0
    device.close()  # a second time does no harm


@pytest.mark.timeout(10)
def test_waiting_for_a_dropped_copy_raises():
    """Rather than for ever: what was dropped at ``close``, and what comes after it."""
    device = EmulatedDevice(gbps=0.01)
    lane = device.incoming
    source, target = (torch.zeros(500_000, dtype=torch.uint8) for _ in range(2))
    copies = [lane.submit(target, source) for _ in range(20)]
    device.close()
    with pytest.raises(RuntimeError):
        copies[-1].wait()
    with pytest.raises(RuntimeError):
        lane.submit(target, source).wait()


@given(st.lists(st.integers(0, 2000), min_size=1, max_size=8))
@settings(deadline=None, max_examples=5)
def test_latency_counts_per_copy(sizes):
    device = EmulatedDevice(latency_us=2000)
    started = time.perf_counter()
    for n in sizes:
        copy = device.incoming.submit(torch.empty(n), torch.zeros(n))
    copy.wait()
    assert time.perf_counter() - started >= 0.002 * len(sizes)
    device.close()


def test_directions_do_not_wait_for_each_other():
    """A long copy to the host does not hold up one to the device."""
    device = EmulatedDevice(gbps=0.001)
    device.outgoing.submit(torch.zeros(5000, dtype=torch.uint8), torch.zeros(5000, dtype=torch.uint8))
    started = time.perf_counter()
    device.outgoing.submit(torch.zeros(10**6, dtype=torch.uint8), torch.zeros(10**6, dtype=torch.uint8))
    device.incoming.submit(torch.zeros(1), torch.zeros(1)).wait()
    assert time.perf_counter() - started < 0.9, "the long one takes a second"
    device.close()


def test_chaos_computes_in_order_and_later():
    device, seen = chaotic(longest_ms=20), []
    for i in range(20):
        device.launch("count", seen.append, i)
    assert len(seen) < 20
    device.finish()
    assert seen == list(range(20))
    device.close()


def test_chaos_copies_after_what_it_was_told_to_wait_for():
    """The computation reads the target late; a copy that waits for it changes nothing."""
    for seed in range(20):
        device, seen = chaotic(seed, longest_ms=2), []
        target = torch.zeros(4)
        device.launch("read", lambda target=target, seen=seen: seen.append(target.clone()))
        device.incoming.submit(target, torch.ones(4), after=device.record()).wait()
        device.finish()
        assert torch.equal(seen[0], torch.zeros(4))
        assert torch.equal(target, torch.ones(4))
        device.close()


def test_chaos_poisons():
    """New buffers, released ones, and the target of a copy that is under way."""
    device = chaotic(longest_ms=0.01)
    buffer = device.empty((3,), torch.float16)
    assert buffer.isnan().all()
    assert (device.host_empty((3,), torch.int8) == -1).all()
    device.incoming.submit(buffer, torch.ones(3)).wait()
    assert torch.equal(buffer, torch.ones(3, dtype=torch.float16))
    device.release(buffer).wait()
    assert buffer.isnan().all()
    device.close()


def test_a_failed_computation_raises_at_the_end_of_it():
    device = chaotic()
    device.launch("fail", lambda: torch.ones(2) + torch.ones(3))
    with pytest.raises(RuntimeError, match="must match"):
        device.finish()
    device.finish()
    device.close()
