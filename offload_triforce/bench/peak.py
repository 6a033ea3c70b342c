"""The most memory that was in use while something ran."""

from __future__ import annotations

import threading

import psutil
import torch

# Seconds between two looks at the process: large buffers stay far longer than that.
PERIOD = 0.02


class PeakMemory:
    """While it is entered, it watches. Afterwards ``host`` holds bytes, and ``device`` too, if that is CUDA."""

    def __init__(self, device: torch.device) -> None:
        self.host, self.device = 0, None
        self._where, self._over = device, threading.Event()
        self._process = psutil.Process()
        self._thread = threading.Thread(target=self._watch, name="watch memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        if self._where.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._where)
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()
        if self._where.type == "cuda":
            self.device = torch.cuda.max_memory_allocated(self._where)

    def _watch(self) -> None:
        while not self._over.wait(PERIOD):
            self._look()

    def _look(self) -> None:
        self.host = max(self.host, self._process.memory_info().rss)
