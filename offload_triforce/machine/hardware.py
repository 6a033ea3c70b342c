"""What a plan is made for: a card, its link and the host's memory; and measurements of a real one, kept in a file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from offload_triforce.errors import InputError
from offload_triforce.machine.cards import Card, find_card, slot_gbps
from offload_triforce.machine.folders import cache_folder
from offload_triforce.machine.memory import free_on_host
from offload_triforce.scheduler.simulate import Speeds

# Of a card of which nothing but its memory is known: those of the middle of the table.
UNKNOWN, UNKNOWN_LINK = Speeds(memory_gbps=600, tflops=80), slot_gbps(generation=4, lanes=16)


@dataclass(frozen=True)
class Machine:
    """``memory``, ``host``: bytes that may be taken (``host`` None: not checked). ``said``: where figures come from."""

    name: str
    memory: int
    link_gbps: float
    speeds: Speeds
    host: int | None = None
    said: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measured:
    """What ``offload-triforce doctor`` measured on this machine, GB/s."""

    gpu: str
    memory_bytes: int
    h2d_gbps: float
    d2h_gbps: float
    memory_gbps: float
    when: str


def measured_file() -> Path:
    """Where measurements are kept."""
    return cache_folder().parent / "machine.json"


def keep_measured(measured: Measured) -> Path:
    """Write a measurement down."""
    path = measured_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(measured), indent=2) + "\n")
    return path


def read_measured() -> Measured | None:
    """The measurement of this machine; None if there is none that can be read."""
    try:
        return Measured(**json.loads(measured_file().read_text()))
    except (OSError, ValueError, TypeError):
        return None


def of_card(card: Card, host: int | None = None) -> Machine:
    """A machine with a card of the table."""
    said = (
        f"link {card.link_gbps:g} GB/s: PCIe {card.generation}.0 x{card.lanes} at about 80 % of its raw speed",
        f"{card.name}: {card.memory_gbps:g} GB/s of memory bandwidth, {card.tflops:.0f} dense TFLOPS ({card.source})",
    )
    speeds = Speeds(card.memory_gbps, card.tflops, cc=card.cc, sms=card.sms)
    return Machine(card.name, card.memory_bytes, card.link_gbps, speeds, host, said)


def find_machine(
    gpu: str | None, memory: int | None, link: float | None, hbm: float | None, host: int | None
) -> Machine:
    """The machine that a user describes; without ``gpu`` and ``memory``, this one.

    Args:
        gpu: a card of the table. memory: bytes of device memory. link, hbm: GB/s. host: bytes.

    Raises:
        InputError: unknown card, or nothing described and no GPU here.
    """
    for value, option in ((memory, "--vram"), (link, "--link"), (hbm, "--hbm"), (host, "--ram")):
        if value is not None and value <= 0:
            raise InputError(f"{option} must be greater than 0")
    if gpu is not None:
        machine = of_card(find_card(gpu), host)
    elif memory is not None:
        said = f"link {UNKNOWN_LINK:g} GB/s, memory {UNKNOWN.memory_gbps:g} GB/s where not given"
        machine = Machine("the card described", memory, UNKNOWN_LINK, UNKNOWN, host, (said,))
    else:
        machine = this_machine(host)
    said = machine.said
    if memory is not None and gpu is not None:
        machine = replace(machine, memory=memory)
    if link is not None:
        machine, said = replace(machine, link_gbps=link), (*said, f"link {link:g} GB/s, as given")
    if hbm is not None:
        machine = replace(machine, speeds=replace(machine.speeds, memory_gbps=hbm))
        said = (*said, f"memory bandwidth {hbm:g} GB/s, as given")
    return replace(machine, said=said)


def this_machine(host: int | None = None, device: int = 0) -> Machine:
    """The machine that this runs on: its card, as measured if ``doctor`` has been run, and its free host memory.

    ``host``: bytes of host memory instead. ``device``: the card's number.

    Raises:
        InputError: there is no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise InputError('there is no GPU here to plan for; name a card, as in --gpu "RTX 4090", or give --vram 24GB')
    host = free_on_host() if host is None else host
    properties = torch.cuda.get_device_properties(device)
    name = properties.name
    free, total = torch.cuda.mem_get_info(device)
    try:
        machine = of_card(find_card(name, total), host)
    except InputError:
        cc = 10 * properties.major + properties.minor
        speeds = replace(UNKNOWN, cc=cc, sms=properties.multi_processor_count)
        machine = Machine(name, free, UNKNOWN_LINK, speeds, host)
    measured = read_measured()
    if measured is None or measured.gpu != name:
        said = (*machine.said, "not measured: `offload-triforce doctor` does it once")
        return replace(machine, memory=free, said=said)
    speeds = replace(machine.speeds, memory_gbps=measured.memory_gbps, memory_share=1.0)
    said = (f"link {measured.h2d_gbps:.1f} and memory {measured.memory_gbps:.0f} GB/s, measured here {measured.when}",)
    return replace(machine, memory=free, link_gbps=measured.h2d_gbps, speeds=speeds, said=said)
