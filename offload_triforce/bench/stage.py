"""Where throughput is measured: the question, the model, and the link as it is, capped, or emulated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from offload_triforce.bench.ballast import BallastDevice
from offload_triforce.bench.contenders import WAYS
from offload_triforce.bench.slow_motion import SlowMotion
from offload_triforce.engine import TriForce
from offload_triforce.errors import InputError
from offload_triforce.generation.checks import check_context
from offload_triforce.machine.hardware import Machine, find_machine
from offload_triforce.machine.measure import free_memory, link_ceiling
from offload_triforce.model.fetch import find_source
from offload_triforce.model.loader import load_model, max_positions
from offload_triforce.scheduler.device import CudaDevice, Device
from offload_triforce.scheduler.emulated import EmulatedDevice
from offload_triforce.scheduler.host import HostDevice

CONTEXTS = {"qwen-coder": (6000, 24_000)}
SHORT = (2000, 6000)  # of all other models
COPY = 16 << 20  # bytes of the copies that the link is measured with: about a tile

Say = Callable[[str], None]


@dataclass(frozen=True)
class ThroughputQuery:
    """What is to be measured.

    Attributes:
        model: of ``fetch.MODELS``, or whatever ``TriForce.load`` takes.
        contexts: tokens of text; empty takes the model's own. new_tokens: of each answer.
        ways: of WAYS.
        card: emulate this one in slow motion, on the CPU.
        vram: cap of the process' device memory, bytes (CUDA). link: cap of the link, GB/s each way.
        bare: on the CPU without any link, each of the tasks of ``bench.tasks``.
    """

    model: str
    contexts: Sequence[int] = ()
    new_tokens: int = 48
    ways: Sequence[str] = tuple(WAYS)
    card: str | None = None
    vram: int | None = None
    link: float | None = None
    bare: bool = False

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of text, each."""
        return self.contexts or CONTEXTS.get(self.model, SHORT)


@dataclass
class Stage:
    """Where it is run: the model, and the link as it is known. ``gbps`` None: there is no link.

    ``h2d``, ``d2h``: what a real link gives, if it is to be slowed.
    """

    engine: TriForce
    source: str
    gbps: float | None
    link: str
    h2d: float = 0.0
    d2h: float = 0.0
    slow: SlowMotion | None = None
    _on_cpu: list[PreTrainedModel] = field(default_factory=list)

    def make_device(self) -> Device:
        """What copies, with its link."""
        device = self.engine.layout.device
        if device.type != "cuda":
            return HostDevice() if self.gbps is None else EmulatedDevice(self.gbps)
        return BallastDevice(device, self.gbps, self.h2d, self.d2h) if self.h2d else CudaDevice(device)

    @property
    def model_on_cpu(self) -> PreTrainedModel:
        """The model itself if it is there, else a copy, loaded when it is first needed."""
        if self.engine.layout.device.type == "cpu":
            return self.engine.model
        if not self._on_cpu:
            self._on_cpu.append(load_model(self.source, self.engine.layout.dtype, torch.device("cpu"))[0])
        return self._on_cpu[0]


def check(asked: ThroughputQuery) -> None:
    """What can be refused before the weights are read.

    Raises:
        InputError: one sentence.
    """
    for way in asked.ways:
        if way not in WAYS:
            raise InputError(f"unknown way {way!r}; known are {', '.join(WAYS)}")
    if asked.card is not None:
        card_machine(asked)  # an unknown one is refused here
    if asked.bare and asked.card is not None:
        raise InputError("--link none is this machine's CPU without a link; it has no meaning with --emulate")
    cuda = torch.cuda.is_available() and asked.card is None and not asked.bare
    if asked.vram is not None and asked.card is not None:
        raise InputError("--vram caps a real card's memory; it has no meaning with --emulate")
    if asked.vram is not None and not cuda:
        raise InputError("--vram caps the memory of a CUDA device, and there is none here; leave it out")
    if asked.vram is not None and asked.vram > (total := torch.cuda.get_device_properties(0).total_memory):
        raise InputError(f"--vram {asked.vram / 1e9:.1f}GB is more than the card's {total / 1e9:.1f}GB")
    if asked.link is not None and asked.link <= 0:
        raise InputError("--link must be greater than 0")
    for context in asked.contexts:
        if context < 64:
            raise InputError(f"--context must be at least 64 tokens, not {context}")


def card_machine(asked: ThroughputQuery) -> Machine:
    """The card in slow motion; ``--link`` puts it into another slot."""
    try:
        return find_machine(asked.card, None, asked.link, None, None)
    except InputError as error:  # the planner's options are of no use here
        raise InputError(str(error).partition("; or describe")[0]) from error


def set_up(asked: ThroughputQuery, say: Say) -> Stage:
    """Find out about the link, cap what is to be capped, load the model.

    Raises:
        InputError: the link is to be faster than it is, or a context is too long for the model.
    """
    source = find_source(asked.model)
    longest = max(asked.lengths)
    check_context(longest, max_positions(source))
    cuda = torch.cuda.is_available() and asked.card is None and not asked.bare
    gbps, link, real = asked.link, "emulated" if asked.link or asked.card else "none: tiles lie in memory", {}
    if cuda:
        measured = link_ceiling(torch.device("cuda"), COPY)
        real = {"h2d": measured["h2d_gbps"], "d2h": measured["d2h_gbps"]}
        if asked.link is not None and asked.link > real["h2d"]:
            raise InputError(f"--link {asked.link:g}GB/s is more than the {real['h2d']:.1f} GB/s that this link gives")
        gbps, link = asked.link or real["h2d"], "capped" if asked.link else "measured"
        free_memory()
        if asked.vram is not None:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(asked.vram / total)
    say(f"loading {asked.model}")
    engine = TriForce.load(source, "ngram", device="cuda" if cuda else "cpu")
    return Stage(engine, source, gbps, link, **(real if asked.link is not None else {}))
