"""CUDA streams without CUDA: work is queued, and runs later in any order that streams and events allow.

``CudaDevice`` runs on it unchanged. Copies between tensors are queued on the stream under which they are issued, and
so is what is launched; ``drain`` runs everything in a random order that a real device could have taken.
"""

from __future__ import annotations

import random

import torch

from offload_triforce.kernels import ops
from offload_triforce.scheduler.device import CudaDevice


class FakeEvent:
    cuda = None

    def __init__(self, enable_timing=False):
        self.over, self._timed = False, enable_timing

    def elapsed_time(self, other):
        """As on CUDA: of events that are timed, when both are over."""
        assert self._timed
        assert other._timed
        assert self.over
        assert other.over
        return 1.0

    def synchronize(self):
        """Whoever looks at a time has looked at what comes after it; whoever waits for a copy has not."""
        if self.cuda is not None:
            self.cuda.synchronizations += 1
            self.cuda.drain()


class FakeStream:
    def __init__(self, cuda):
        self.cuda, self.queue = cuda, []
        cuda.streams.append(self)

    def record_event(self, event=None):
        event = event or FakeEvent()
        event.cuda = self.cuda
        self.queue.append((None, lambda: setattr(event, "over", True)))
        return event

    def wait_event(self, event):
        self.queue.append((event, lambda: None))

    def synchronize(self):
        self.cuda.synchronizations += 1
        self.cuda.drain()


class FakeCuda:
    """Stands in for torch.cuda while the fixture of a test is alive."""

    def __init__(self, monkeypatch, seed):
        self.chance, self.streams, self.synchronizations = random.Random(seed), [], 0
        self.default = self.active = FakeStream(self)
        real_copy = torch.Tensor.copy_

        def copy_(target, source, non_blocking=False):
            if self.active is self.default:
                return real_copy(target, source)
            assert non_blocking
            self.active.queue.append((None, lambda: real_copy(target, source)))
            return target

        def on_stream(kernel):
            """What Triton launches on the current stream."""

            def launch(*args):
                if self.active is self.default:
                    kernel(*args)
                else:
                    self.active.queue.append((None, lambda: kernel(*args)))

            return launch

        monkeypatch.setattr(torch.Tensor, "copy_", copy_)
        monkeypatch.setattr(ops, "wire_encode", on_stream(ops.wire_encode))
        monkeypatch.setattr(ops, "wire_decode", on_stream(ops.wire_decode))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(self))
        monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.active)
        monkeypatch.setattr(torch.cuda, "set_stream", self._activate)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "synchronize", self.default.synchronize)

    def _activate(self, stream):
        self.active = stream

    def drain(self):
        """Run all that is queued, a random stream's next step at a time."""
        while any(stream.queue for stream in self.streams):
            ready = [s for s in self.streams if s.queue and (s.queue[0][0] is None or s.queue[0][0].over)]
            assert ready, "streams wait for each other for ever"
            _, work = self.chance.choice(ready).queue.pop(0)
            before, self.active = self.active, self.default  # what a kernel does is no work of a stream's own
            work()
            self.active = before


class FakeCudaDevice(CudaDevice):
    """``CudaDevice`` on a fake CUDA: only what touches memory is replaced."""

    def __init__(self, cuda, trace=None):
        self.cuda = cuda
        super().__init__(torch.device("cpu"), trace)

    def stream(self):
        return self.cuda.active

    def empty(self, shape, dtype):
        return torch.full(shape, 255 if dtype == torch.uint8 else float("nan"), dtype=dtype)

    def launch(self, name, work, *args):
        self.cuda.default.queue.append((None, lambda: work(*args)))

    def finish(self):
        """Nothing to do on CUDA; here the numbers are wanted."""
        self.cuda.drain()
