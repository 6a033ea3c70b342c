"""One answer of ours to one prompt: the prompt is read once, and what is timed sees nothing of that."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from offload_triforce.config import Settings
from offload_triforce.engine import TriForce
from offload_triforce.generation.answer import TextStream
from offload_triforce.machine.measure import synchronize
from offload_triforce.model.adapter import attached
from offload_triforce.runtime.levels import RetrievalLevel
from offload_triforce.runtime.reading import Reading
from offload_triforce.runtime.runtime import Runtime
from offload_triforce.runtime.session import Session
from offload_triforce.scheduler.device import Device, on
from offload_triforce.scheduler.emulated import EmulatedDevice
from offload_triforce.speculation.tree import chain

# Tokens decoded on a CPU before the clock runs.
WARM_UP = 16


@dataclass(frozen=True)
class Case:
    """What every way is given: token ids of the prompt, and how many tokens are wanted."""

    prompt: list[int]
    new_tokens: int

    @property
    def capacity(self) -> int:
        """Tokens that the caches have to hold."""
        return len(self.prompt) + self.new_tokens


@dataclass(frozen=True)
class Read:
    """A prompt, all but its last token, read once for all of our ways on a CPU; ``seconds`` it took."""

    reading: Reading
    seconds: float

    @classmethod
    def of(cls, engine: TriForce, prompt: list[int]) -> Read:
        """Read it. Its KV stays in host memory."""
        started = time.perf_counter()
        reading = Reading.of(engine.model, engine.layout, prompt[:-1], engine.settings.prefill_chunk)
        return cls(reading, time.perf_counter() - started)

    @property
    def size(self) -> int:
        """Bytes of its KV."""
        return self.reading.size


@dataclass(frozen=True)
class Answering:
    """A session and a drafter for one prompt. ``prefill_s``: what reading it took."""

    engine: TriForce
    session: Session
    case: Case
    prefill_s: float

    @classmethod
    @contextmanager
    def warm(
        cls, engine: TriForce, settings: Settings, case: Case, read: Read | None, device: Device
    ) -> Iterator[Answering]:
        """Filled with all of the prompt but its last token, and warmed up by a short answer, at no link on a CPU.

        ``settings``: with ``gamma`` 0, nobody drafts. ``read``: the prompt as it was read before, instead of a prefill.

        Raises:
            MemoryLimitError: does not fit.
        """
        mine = TriForce(engine.model, engine.tokenizer, "ngram" if settings.gamma else "none", settings=settings)
        runtime = Runtime(engine.model, engine.layout, settings, case.capacity, device=device)
        try:
            session = Session(runtime)
            with _link_off(runtime.device):
                _begin(session, case, read)
                _warm_up(cls(mine, session, case, 0.0))
                prefill_s = _begin(session, case, read)
            yield cls(mine, session, case, prefill_s)
        finally:
            runtime.close()
            mine.close()

    def answer(self, new_tokens: int | None = None) -> TextStream:
        """Decode, greedily; once, since the caches go on with the text."""
        wanted = new_tokens or self.case.new_tokens
        stream = self.engine.resume(self.session, self.case.prompt, 0, max_new_tokens=wanted, do_sample=False)
        for _ in stream:
            pass
        return stream


def _warm_up(answering: Answering) -> None:
    """Let whatever is set up at first use be set up.

    On CUDA every shape of a step is compiled for at its first use, captured at its second and compared at its third,
    and passes have shapes too: those of the answer itself.
    """
    runtime, case = answering.session.runtime, answering.case
    if runtime.layout.device.type != "cuda":
        answering.answer(min(WARM_UP, case.new_tokens))
        return
    level, settings = RetrievalLevel(runtime.model, runtime.caches, runtime.graphs), runtime.settings
    with on(runtime.layout.device), attached(runtime.model), torch.no_grad():
        for tokens in range(1, settings.width + settings.gamma1 + 1 if settings.gamma else 1):
            for _ in range(3):
                level.score(chain(case.prompt[:tokens]), [])
                level.keep([])
    answering.answer()


@contextmanager
def _link_off(device: Device) -> Iterator[None]:
    """An emulated link is as fast as memory meanwhile; a real one stays what it is."""
    if not isinstance(device, EmulatedDevice):
        yield
        return
    gbps, device.gbps = device.gbps, None
    try:
        yield
    finally:
        device.gbps = gbps


def _begin(session: Session, case: Case, read: Read | None) -> float:
    """Begin with all of the prompt but its last token; returns the seconds that reading it takes."""
    if read is not None:
        session.begin_as_read(read.reading)
        return read.seconds
    runtime = session.runtime
    if runtime.caches.full is not None:
        runtime.caches.full.stream.store.wait_pinned()  # a machine's own pace, once per process: not what is timed
    device = runtime.layout.device
    started = time.perf_counter()
    with on(device), attached(runtime.model), torch.no_grad():
        session.begin(torch.tensor(case.prompt[:-1]))
    synchronize(device)
    return time.perf_counter() - started
