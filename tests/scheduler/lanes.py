"""Lanes that make mistakes of timing visible every time, where a thread would show them now and then."""

from __future__ import annotations

from offload_triforce.scheduler.device import ThreadLane


class EagerLane:
    """Copies at once: whoever hands a buffer out too early finds it overwritten."""

    def __init__(self):
        self.moved = 0
        self.submitted = []  # (target, source) of every copy

    def submit(self, target, source):
        self.moved += source.nbytes
        self.submitted.append((target, source))
        return self._start(target, source)

    def close(self):
        pass

    def _start(self, target, source):
        target.copy_(source)
        return _Pending(None, None)


class LateLane(EagerLane):
    """Copies when waited for: whoever reads without waiting, or changes a source, finds wrong data."""

    def _start(self, target, source):
        return _Pending(target, source)


class _Pending:
    def __init__(self, target, source):
        self.target, self.source = target, source

    def wait(self):
        if self.target is not None:
            self.target.copy_(self.source)
            self.target = None


LANES = {"eager": EagerLane, "late": LateLane, "thread": ThreadLane}
