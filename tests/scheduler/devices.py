"""Devices that make mistakes of timing visible every time, where threads would show them now and then."""

from __future__ import annotations

import contextlib
import functools

import torch

from offload_triforce.scheduler.clock import HostMark
from offload_triforce.scheduler.emulated import Chaos, EmulatedDevice, poison


class EagerDevice:
    """Copies at once: whoever hands a buffer out too early finds it overwritten. The simplest device there is."""

    trace = None
    unified = False

    def __init__(self, where="cpu"):
        self.where = where
        self.incoming, self.outgoing = self._lane(), self._lane()

    def _lane(self):
        return EagerLane()

    def empty(self, shape, dtype):
        return torch.empty(shape, dtype=dtype, device=self.where)

    def host_empty(self, shape, dtype):
        return torch.empty(shape, dtype=dtype, device="cpu")

    def reclaim(self):
        pass

    def record(self):
        return _Done()

    def catch_up(self):
        pass

    def mark(self):
        return HostMark()

    def release(self, buffer):
        return _Done()

    def await_landing(self, landed):
        landed.wait()
        return lambda: 0.0

    def launch(self, name, work, *args):
        work(*args)

    def finish(self):
        pass

    def span(self, track, name, size=0):
        return contextlib.nullcontext()

    def close(self):
        pass


class LateDevice(EagerDevice):
    """Copies when waited for: whoever reads without waiting, or changes a source, finds wrong data.

    Buffers are full of NaN to begin with: what is left in memory might be what somebody else has copied there before.
    """

    def _lane(self):
        return LateLane()

    def empty(self, shape, dtype):
        return _poisoned(super().empty(shape, dtype))

    def host_empty(self, shape, dtype):
        return _poisoned(super().host_empty(shape, dtype))


def _poisoned(buffer):
    poison(buffer)
    return buffer


class _Done:
    def wait(self):
        pass

    def reach(self):
        pass

    def arrived(self):
        return True


class EagerLane:
    def __init__(self):
        self.moved = 0
        self.submitted = []  # (target, source) of every copy
        self.after = []  # what each of them comes after
        self.beside = []  # what is computed before and after each

    def submit(self, target, source, after=None, first=None, then=None):
        self.moved += source.nbytes
        self.submitted.append((target, source))
        self.after.append(after)
        self.beside.append((first, then))
        return self._start()

    def _start(self):
        self._copy(-1)
        return _Done()

    def _copy(self, number):
        """With what is computed before and after it."""
        (target, source), (first, then) = self.submitted[number], self.beside[number]
        if first is not None:
            first()
        target.copy_(source)
        if then is not None:
            then()


class LateLane(EagerLane):
    def __init__(self):
        super().__init__()
        self.started = 0

    def _start(self):
        return _Late(self, len(self.submitted))

    def catch_up(self, count):
        while self.started < count:
            if (after := self.after[self.started]) is not None:
                after.wait()
            self._copy(self.started)
            self.started += 1


class _Late:
    def __init__(self, lane, count):
        self.lane, self.count = lane, count

    def wait(self):
        self.lane.catch_up(self.count)

    reach = wait

    def arrived(self):
        return False


def chaotic(seed=0, longest_ms=0.05):
    """A device with asynchronous computation, random delays and poisoned buffers."""
    return EmulatedDevice(chaos=Chaos(seed, longest_ms))


DEVICES = {
    "eager": EagerDevice,
    "late": LateDevice,
    "thread": EmulatedDevice,
    "chaos": functools.partial(chaotic, 1),
}
