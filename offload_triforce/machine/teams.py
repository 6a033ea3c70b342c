"""OpenMP's teams of threads: each thread that computes has one, and idle ones slow down the others.

GCC's OpenMP, which torch brings on Linux, counts the threads of all teams. As long as there are more of them than
cores, those of every team go to sleep after each operation instead of waiting for the next one for some milliseconds.
A model of small operations then runs as if it had one thread: SmolLM2's steps on 2 cores take 1.6 times as long. So a
thread that is through with its work lets its team go.
"""

from __future__ import annotations

import ctypes
import functools
import re
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
        paths = set(re.findall(r"\S*/libgomp[^/\s]*\.so\S*", _MAPS.read_text()))
    except OSError:  # not Linux
        return []
    libraries = map(ctypes.CDLL, sorted(paths))
    return [library.omp_pause_resource_all for library in libraries if hasattr(library, "omp_pause_resource_all")]
