"""What the card says of itself, and the link alone: both directions, both at once, small copies, pinning."""

from __future__ import annotations

import importlib.util
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from offload_triforce.machine.doctor import card_id
from offload_triforce.machine.measure import seconds, synchronize
from offload_triforce.scheduler.pinning import cuda_pin, cuda_unpin

SMALL = 4096  # bytes, about what a step of the retrieval level sends
FIELDS = ("name", "driver_version", "compute_cap", "pcie.link.gen.current", "pcie.link.gen.max")
FIELDS += ("pcie.link.width.current", "pcie.link.width.max", "clocks.current.sm", "clocks.max.sm")
FIELDS += ("clocks.current.memory", "clocks.max.memory", "clocks_throttle_reasons.active")
FIELDS += ("power.draw", "power.limit", "temperature.gpu", "persistence_mode")


def card_says() -> dict[str, str]:
    """nvidia-smi's answer, field by field: driver, clocks, PCIe; and pynvml's, where that is there already."""
    tool = shutil.which("nvidia-smi")
    said: dict[str, str] = {}
    if tool is None:
        said["nvidia-smi"] = "not there"
    else:
        for field in FIELDS:  # one by one: a driver that does not know one of them answers nothing at all
            command = [tool, f"--query-gpu={field}", "--format=csv,noheader", f"--id={card_id()}"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=20)
            said[field] = done.stdout.strip() if done.returncode == 0 else "not known to this driver"
    if importlib.util.find_spec("pynvml") is not None and torch.cuda.is_available():
        import pynvml

        pynvml.nvmlInit()
        said["CUDA of the driver"] = str(pynvml.nvmlSystemGetCudaDriverVersion_v2())
        pynvml.nvmlShutdown()
    return said


class Buffers:
    """Pinned host memory and a ring on the device, with a stream for each direction (none on a CPU)."""

    def __init__(self, device: torch.device, tile_bytes: int, total: int) -> None:
        self.device, self.tile_bytes = device, tile_bytes
        self.count = max(4, total // tile_bytes)
        started = time.perf_counter()
        self.host = torch.zeros(2, self.count, tile_bytes, dtype=torch.uint8)
        self.touch_s = time.perf_counter() - started
        self.ring = torch.zeros(2, 4, tile_bytes, dtype=torch.uint8, device=device)
        self.small_host = torch.zeros(2, SMALL, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.small = torch.zeros(2, SMALL, dtype=torch.uint8, device=device)
        self.streams = [torch.cuda.Stream(device) for _ in range(4)] if device.type == "cuda" else [None] * 4
        self.pin_s: float | None = None
        if device.type == "cuda":
            started = time.perf_counter()
            cuda_pin(self.host, device)
            self.pin_s = time.perf_counter() - started

    def close(self) -> None:
        if self.pin_s is not None:
            synchronize(self.device)
            cuda_unpin(self.host)

    def to_device(self) -> None:
        """All tiles, on a stream of its own."""
        with torch.cuda.stream(self.streams[0]):
            for i in range(self.count):
                self.ring[0, i % 4].copy_(self.host[0, i], non_blocking=True)

    def to_host(self) -> None:
        """All tiles back, on another."""
        with torch.cuda.stream(self.streams[1]):
            for i in range(self.count):
                self.host[1, i].copy_(self.ring[1, i % 4], non_blocking=True)


def link(device: torch.device, tile_bytes: int, total: int = 1 << 30) -> dict[str, Any]:
    """GB/s of copies of a tile's size in each direction, alone and both at once; small copies; and pinning."""
    buffers = Buffers(device, tile_bytes, total)
    try:
        moved = buffers.count * tile_bytes

        def both() -> None:
            buffers.to_device()
            buffers.to_host()

        together = seconds(device, both, 3)
        return {
            "tile_bytes": tile_bytes,
            "h2d_gbps": moved / seconds(device, buffers.to_device, 3) / 1e9,
            "d2h_gbps": moved / seconds(device, buffers.to_host, 3) / 1e9,
            "both_at_once_gbps": 2 * moved / together / 1e9,
            "pin_gbps": None if buffers.pin_s is None else buffers.host.nbytes / buffers.pin_s / 1e9,
            "first_touch_gbps": buffers.host.nbytes / buffers.touch_s / 1e9,
            "small_copies_us": small_copies(buffers),
        }
    finally:
        buffers.close()


def small_copies(buffers: Buffers, repeats: int = 20) -> dict[str, float]:
    """Microseconds from asking for a copy of SMALL bytes until it is there: on an idle link, and while tiles stream in.

    A small copy to the device shares the copy engine with the tiles, and may wait for those that were asked for first.
    """

    def timed(target: Tensor, source: Tensor, stream: Any, before: Callable[[], None]) -> float:
        taken = []
        for _ in range(repeats):
            before()
            started = time.perf_counter()
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)
            if stream is not None:
                stream.synchronize()
            taken.append(time.perf_counter() - started)
            synchronize(buffers.device)
        return 1e6 * statistics.median(taken)

    def some_tiles() -> None:
        with torch.cuda.stream(buffers.streams[0]):
            for i in range(4):
                buffers.ring[0, i].copy_(buffers.host[0, i], non_blocking=True)

    found = {}
    for name, before in (("idle", lambda: None), ("streaming", some_tiles)):
        found[f"h2d_{name}"] = timed(buffers.small[0], buffers.small_host[0], buffers.streams[2], before)
        found[f"d2h_{name}"] = timed(buffers.small_host[1], buffers.small[1], buffers.streams[3], before)
    return found
