"""How fast the link and the memory of a device really are, by trying."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch

from offload_triforce.scheduler.pinning import cuda_pin, cuda_unpin


def synchronize(device: torch.device) -> None:
    """Wait until the device is through, so that a clock means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, work: Callable[[], object], repeats: int) -> float:
    """Median time of one call, the device being idle before and after."""
    work()
    times = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def link_ceiling(device: torch.device, tile_bytes: int, total: int = 1 << 30, repeats: int = 3) -> dict[str, float]:
    """Bandwidth of back-to-back pinned copies of the size of a tile, GB/s, in each direction."""
    count = max(2, total // tile_bytes)
    host = torch.zeros(count, tile_bytes, dtype=torch.uint8)
    ring = torch.zeros(4, tile_bytes, dtype=torch.uint8, device=device)
    if device.type == "cuda":
        cuda_pin(host, device)
    try:

        def to_device() -> None:
            for i in range(count):
                ring[i % 4].copy_(host[i], non_blocking=True)

        def to_host() -> None:
            for i in range(count):
                host[i].copy_(ring[i % 4], non_blocking=True)

        return {
            "tile_bytes": tile_bytes,
            "h2d_gbps": host.nbytes / seconds(device, to_device, repeats) / 1e9,
            "d2h_gbps": host.nbytes / seconds(device, to_host, repeats) / 1e9,
        }
    finally:
        if device.type == "cuda":
            cuda_unpin(host)


def memory_bandwidth(device: torch.device, size: int = 1 << 30) -> float:
    """GB/s of a copy within device memory, reads and writes counted."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(device, lambda: target.copy_(source), 10) / 1e9


def free_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
