"""OpenMP's teams of threads: each thread that computes has one, and idle ones slow down the others.

GCC's OpenMP, which torch brings on Linux, counts the threads of all teams. As long as there are more of them than
cores, those of every team go to sleep after each operation instead of waiting for the next one for some milliseconds.
A model of small operations then runs as if it had one thread: SmolLM2's steps on 2 cores take 1.6 times as long. So a
thread that is through with its work lets its team go.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path

SOFT = 1  # omp_pause_soft: OpenMP 5.0, section 3.2.7
_MAPS = Path("/proc/self/maps")


def release_team() -> None:
    """Let go of the threads that OpenMP keeps for this one. Its next operation makes them anew, in about 0.1 ms."""
    for pause in _pauses():
        pause(SOFT)


@functools.cache
def _pauses() -> list[Callable[[int], int]]:
    """``omp_pause_resource_all`` of each OpenMP library of GCC's that is loaded; of one thread, unlike in LLVM's."""
    try:
        lines = os.fsdecode(_MAPS.read_bytes()).splitlines()
    except OSError:  # not Linux
        return []
    columns = (line.split(maxsplit=5) for line in lines)
    paths = {mapped[5] for mapped in columns if len(mapped) == 6 and os.path.basename(mapped[5]).startswith("libgomp")}
    found = []
    for path in sorted(paths):
        try:
            found.append(ctypes.CDLL(path, os.RTLD_NOW | os.RTLD_NOLOAD).omp_pause_resource_all)
        except (OSError, UnicodeError, AttributeError):  # replaced on disk since, or older than OpenMP 5
            continue
    return found


def _forget() -> None:
    """A child process has none of the threads, and waiting for them would never end."""
    global _pauses
    _pauses = list


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
