"""What of the environment is missing or slow, each with its remedy; and how fast its link and memory are."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from offload_triforce.errors import MemoryLimitError
from offload_triforce.kernels.ops import what_stops_triton
from offload_triforce.machine.cards import LINK_GBPS, slot_gbps
from offload_triforce.machine.describe import describe_machine
from offload_triforce.machine.hardware import Measured, keep_measured
from offload_triforce.machine.measure import link_ceiling, memory_bandwidth
from offload_triforce.machine.memory import free_on_host
from offload_triforce.machine.packages import UPDATE, too_old_fla, what_bitsandbytes_lacks
from offload_triforce.scheduler.plan import TILE_BYTES

_QUERY = ("name", "driver_version", "pcie.link.gen.current", "pcie.link.gen.max")
_QUERY += ("pcie.link.width.current", "pcie.link.width.max")


@dataclass(frozen=True)
class Finding:
    """``state``: ok, slow, missing or note. ``remedy``: what to do about it, if anything."""

    what: str
    state: str
    found: str
    remedy: str | None = None


def examine() -> dict[str, Any]:
    """All findings and a measurement, for JSON: ``findings``, ``measured``, ``machine``."""
    smi = ask_driver()
    findings = [*check_gpu(smi), check_triton(), check_quantiser(), check_hybrid(), *check_host(), check_pinning()]
    if (wsl := check_wsl(platform.release())) is not None:
        findings.append(wsl)
    measured, lines = measure()
    if "h2d_gbps" in measured and smi is not None:
        findings.append(check_link_speed(measured["h2d_gbps"], smi))
    return {
        "findings": [asdict(finding) for finding in findings],
        "measured": measured,
        "measured_lines": lines,
        "machine": describe_machine(),
    }


def ask_driver() -> dict[str, str] | None:
    """What nvidia-smi says of the card that is used; None without it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader", f"--id={card_id()}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return read_answer(done.stdout) if done.returncode == 0 else None


def card_id() -> str:
    """How nvidia-smi knows the card that torch counts as the first: the two need not count alike."""
    if not torch.cuda.is_available():
        return "0"
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    return "0" if uuid is None else f"GPU-{str(uuid).removeprefix('GPU-')}"


def read_answer(text: str) -> dict[str, str] | None:
    """The fields of nvidia-smi's first line by name; None if it is not such a line."""
    values = [value.strip() for value in (text.splitlines() or [""])[0].split(",")]
    return dict(zip(_QUERY, values, strict=True)) if len(values) == len(_QUERY) else None


def check_gpu(smi: dict[str, str] | None) -> list[Finding]:
    """Driver, torch's build, and the slot that the card sits in."""
    build = torch.version.cuda
    if smi is None and not torch.cuda.is_available():
        remedy = "install NVIDIA's driver, then a CUDA build of torch; without a card everything runs on the CPU"
        return [Finding("NVIDIA driver", "missing", "nvidia-smi does not answer", remedy)]
    findings = []
    if smi is not None:
        findings.append(Finding("NVIDIA driver", "ok", f"{smi['driver_version']} ({smi['name']})"))
    if build is None:
        remedy = "install a build of torch with CUDA, as pytorch.org's selector says"
        findings.append(Finding("torch", "missing", f"{torch.__version__}, built without CUDA", remedy))
    elif not torch.cuda.is_available():
        remedy = f"update the driver to one that knows CUDA {build}, or take a torch for an older CUDA"
        findings.append(Finding("torch", "missing", f"{torch.__version__} for CUDA {build} finds no card", remedy))
    else:
        findings.append(Finding("torch", "ok", f"{torch.__version__} for CUDA {build}"))
    if smi is not None:
        findings.append(check_slot(smi))
    return findings


def check_slot(smi: dict[str, str]) -> Finding:
    """PCIe generation and lanes, now and at most. A card at rest lowers its generation, but not its lanes."""
    values = [smi[name] for name in _QUERY[2:]]
    if not all(value.isdigit() for value in values):
        return Finding("PCIe", "note", "the driver does not say its generation and lanes")
    now, most, lanes, most_lanes = map(int, values)
    found = f"gen {now} x{lanes} now, gen {most} x{most_lanes} at most"
    if lanes < most_lanes:
        remedy = (
            f"x{lanes} costs {1 - lanes / most_lanes:.0%} of the bandwidth: put the card into the slot next to the "
            "CPU, and free slots that share its lanes (a second card, an M.2 drive)"
        )
        return Finding("PCIe", "slow", found, remedy)
    if most < 4:
        remedy = (
            "a board and CPU with PCIe 4.0 double the speed of a pass; look for a BIOS setting that holds it at gen 3"
        )
        return Finding("PCIe", "slow", found, remedy)
    return Finding("PCIe", "ok", found)


def check_link_speed(gbps: float, smi: dict[str, str]) -> Finding:
    """The measured bandwidth against what the slot should give."""
    most, lanes = smi["pcie.link.gen.max"], smi["pcie.link.width.current"]
    if not (most.isdigit() and lanes.isdigit()) or int(most) not in LINK_GBPS:
        return Finding("link", "note", f"{gbps:.1f} GB/s to the card")
    expected = slot_gbps(int(most), int(lanes))
    found = f"{gbps:.1f} GB/s to the card, {expected:.1f} expected of gen {most} x{lanes}"
    if gbps >= 0.8 * expected:
        return Finding("link", "ok", found)
    remedy = "close what else uses the link; set the BIOS to the slot's full generation; check that no riser limits it"
    return Finding("link", "slow", found, remedy)


def check_triton() -> Finding:
    """Our kernels need it. On a card, a tiny one is launched: an old driver refuses what a new compiler makes."""
    if importlib.util.find_spec("triton") is None:
        return Finding("triton", "slow", "not installed: plain torch runs instead", "pip install triton (Linux)")
    if not torch.cuda.is_available():
        return Finding("triton", "ok", "there; without a card, kernels run as their eager twins in torch")
    if (obstacle := what_stops_triton()) is not None:
        return Finding("triton", "missing", f"its kernels do not run: {obstacle.reason}", obstacle.remedy)
    return Finding("triton", "ok", "there, and a kernel ran")


def check_quantiser() -> Finding:
    """For nf4 and int8 weights."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return Finding("bitsandbytes", "note", "not installed", "for --quantize: pip install 'offload-triforce[bnb]'")
    if (lacking := what_bitsandbytes_lacks()) is not None:
        return Finding("bitsandbytes", "missing", f"too old for --quantize, {lacking.partition(';')[0]}", UPDATE)
    return Finding("bitsandbytes", "ok", "there")


def check_hybrid() -> Finding:
    """For the prompts of models with recurrent layers. On a CPU, and for trees anywhere, it is not needed."""
    what = "flash-linear-attention"
    if (old := too_old_fla()) is not None:
        remedy = "pip install -U fla-core; until then, prompts of hybrid models are read by slower functions"
        return Finding(what, "slow", f"{old} knows no value heads that share a key head, and is not used", remedy)
    if importlib.util.find_spec("fla") is not None:
        return Finding(what, "ok", "there")
    if not torch.cuda.is_available():
        return Finding(what, "note", "not installed; without a card it would not be used")
    remedy = "for hybrid models (Qwen3.5, Qwen3-Next, Olmo Hybrid): pip install 'offload-triforce[hybrid]'"
    return Finding(what, "slow", "not installed: prompts of models with recurrent layers are read more slowly", remedy)


def check_host() -> list[Finding]:
    """Free host memory, and what has been swapped out."""
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    free = free_on_host()
    found = f"{free / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    remedy = None
    if free < 0.9 * memory.available:
        found += f"; {memory.available / 1e9:.1f} but for this container's limit"
        remedy = "give the container more memory (docker run --memory): at its limit, processes are killed"
    elif memory.available < 0.5 * memory.total:
        remedy = "close other programs before a long context: the KV cache is pinned and cannot be swapped out"
    findings = [Finding("host memory", "slow" if remedy else "ok", found, remedy)]
    if swap.used > 1 << 30:
        remedy = "programs have been swapped out already; free memory, so that they are not in each other's way"
        findings.append(Finding("swap", "slow", f"{swap.used / 1e9:.1f} GB in use", remedy))
    else:
        findings.append(Finding("swap", "ok", f"{swap.used / 1e9:.1f} of {swap.total / 1e9:.1f} GB in use"))
    return findings


def check_pinning() -> Finding:
    """The limit on locked memory. CUDA's driver mostly pins beyond it; containers and some systems do hold to it."""
    if sys.platform == "win32":
        return Finding("locked memory", "note", "Windows lets CUDA pin about half of the host memory")
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY or limit >= psutil.virtual_memory().total:
        return Finding("locked memory", "ok", "unlimited")
    remedy = "only if pinning fails: `ulimit -l unlimited`, or `--ulimit memlock=-1` for a container"
    return Finding("locked memory", "note", f"limited to {limit / 1e6:.1f} MB", remedy)


def check_wsl(release: str) -> Finding | None:
    """WSL 2 gets half of the host's memory by default, and pins less of it."""
    if "microsoft" not in release.lower():
        return None
    remedy = "raise memory= under [wsl2] in .wslconfig; native Linux pins all of it and copies faster"
    return Finding("WSL", "slow", "runs under WSL, whose memory and pinning are limited", remedy)


def measure() -> tuple[dict[str, Any], list[str]]:
    """On CUDA, link and device memory, which are kept for ``plan``; else host memory alone. With lines for people."""
    if not torch.cuda.is_available():
        size = 128 << 20
        source = torch.zeros(size, dtype=torch.uint8)
        target, times = torch.zeros_like(source), []
        for _ in range(5):
            started = time.perf_counter()
            target.copy_(source)
            times.append(time.perf_counter() - started)
        gbps = 2 * size / min(times) / 1e9
        line = f"No card, so no link: a copy within host memory runs at {gbps:.1f} GB/s (reads and writes counted)."
        return {"host_memory_gbps": gbps}, [line]
    device = torch.device("cuda", 0)
    try:
        link, memory = link_ceiling(device, TILE_BYTES), memory_bandwidth(device)
    except (MemoryLimitError, torch.OutOfMemoryError) as error:
        return {}, [f"Link and memory could not be measured: {str(error).partition(chr(10))[0]}"]
    properties = torch.cuda.get_device_properties(0)
    when = time.strftime("%Y-%m-%d")
    measured = Measured(properties.name, properties.total_memory, link["h2d_gbps"], link["d2h_gbps"], memory, when)
    try:
        kept = f"and kept for `plan` in {keep_measured(measured)}"
    except OSError as error:
        kept = f"but not kept for `plan` ({error.filename}: {error.strerror})"
    line = (
        f"Measured, {kept}: {measured.h2d_gbps:.1f} GB/s to the card, {measured.d2h_gbps:.1f} GB/s back, "
        f"{measured.memory_gbps:.0f} GB/s within it."
    )
    return asdict(measured), [line]
