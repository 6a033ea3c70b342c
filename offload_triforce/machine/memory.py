"""Host memory that may still be taken: what the machine has, or what a container's limit leaves of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

# By version of control groups: where they are mounted, and the files of a group's limit and use. (Linux,
# Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst)
_GROUPS = {
    "2": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "1": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_on_host(root: Path = Path("/")) -> int:
    """Bytes. A container sees the whole machine's memory, but its processes are killed at its own limit.

    ``root``: where the system's files are.
    """
    return min([psutil.virtual_memory().available, *_rooms(root)])


def free_on(device: torch.device) -> int:
    """Bytes that this process may still take: what the driver has, and what torch keeps cached without using it."""
    reserved = torch.cuda.memory_reserved(device)
    free = torch.cuda.mem_get_info(device)[0]
    share = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # not in all versions of torch
    if share is not None:
        free = min(free, int(share(device) * torch.cuda.get_device_properties(device).total_memory) - reserved)
    return free + reserved - torch.cuda.memory_allocated(device)


def _rooms(root: Path) -> Iterator[int]:
    """What the limits of this process' control groups leave, each with those above it."""
    for version, path in _memberships(root):
        mount, limit_name, used_name, cache_name = _GROUPS[version]
        group = root / mount / path.strip("/")
        # In a container, the path may be the host's, and the mount the container's own group.
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root / mount):
                break
            limit, used = _number(folder / limit_name), _number(folder / used_name)
            if limit is not None and used is not None:
                # Files that were read once count as used, and are dropped when memory is wanted.
                yield max(0, limit - used + _statistic(folder / "memory.stat", cache_name))


def _memberships(root: Path) -> Iterator[tuple[str, str]]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield "2", path
        elif "memory" in controllers.split(","):
            yield "1", path


def _number(path: Path) -> int | None:
    """What a file says; None if there is none, or no limit."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _statistic(path: Path, name: str) -> int:
    try:
        lines = (line.split() for line in path.read_text().splitlines())
        return next(int(value) for key, value in lines if key == name)
    except (OSError, ValueError, StopIteration):
        return 0
