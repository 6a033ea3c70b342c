"""Page-locking host memory in the background: at about 2.5 GB/s it takes half a minute for 70 GB.

The prefill fills slab after slab and is slower than that, so nobody waits for it but the first layers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from offload_triforce.errors import MemoryLimitError

# Told (bytes pinned so far, bytes in all).
Progress = Callable[[int, int], None]


class Pinner:
    """Pins a list of slabs in order, on a thread of its own."""

    def __init__(
        self, slabs: list[Tensor], pin: Callable[[Tensor], None], unpin: Callable[[Tensor], None], progress: Progress
    ) -> None:
        self._slabs, self._pin, self._unpin, self._progress = slabs, pin, unpin, progress
        self._pinned = [threading.Event() for _ in slabs]
        self._error: BaseException | None = None
        self._stop = False
        self._count = 0  # slabs pinned
        self._thread = threading.Thread(target=self._run, name="pin host memory", daemon=True)
        self._thread.start()

    def wait(self, slab: int) -> None:
        """Return once the slab with this number is pinned.

        Raises:
            MemoryLimitError: the system refused to pin it.
        """
        self._pinned[slab].wait()
        if self._error is not None:  # a new one each time: the old one would keep alive all that has seen it
            raise MemoryLimitError(str(self._error))

    def close(self) -> None:
        """Stop, and unpin what has been pinned. Copies from and to the slabs must be through."""
        self._stop = True
        self._thread.join()
        for slab in self._slabs[: self._count]:
            if slab.nbytes:
                self._unpin(slab)
        self._count = 0

    def _run(self) -> None:
        total, done = sum(slab.nbytes for slab in self._slabs), 0
        try:
            for slab, event in zip(self._slabs, self._pinned, strict=True):
                if self._stop:
                    raise MemoryLimitError("pinning was stopped before it was through")
                if slab.nbytes:  # a layer whose tiles are all resident has none
                    self._pin(slab)
                self._count += 1
                event.set()
                done += slab.nbytes
                self._progress(done, total)
        except Exception as error:  # handed to whoever waits
            self._error = error
            for event in self._pinned:
                event.set()


_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device


def cuda_pin(slab: Tensor, device: torch.device) -> None:
    """Page-lock a host tensor in place. torch's own pinned allocator would round its size up to a power of two.

    ``device``: on a new thread another one is current, and would be set up for this.

    Raises:
        MemoryLimitError: the system refuses, mostly for a limit on locked memory.
    """
    with torch.cuda.device(device):
        error = torch.cuda.cudart().cudaHostRegister(slab.data_ptr(), slab.nbytes, _PORTABLE)
    if int(error) != 0:
        raise MemoryLimitError(
            f"{slab.nbytes / 1e9:.1f} GB of host memory could not be pinned (CUDA error {int(error)}); raise the limit "
            "on locked memory (ulimit -l), free some memory, or take a shorter context"
        )


def cuda_unpin(slab: Tensor) -> None:
    """Undo ``cuda_pin``."""
    torch.cuda.cudart().cudaHostUnregister(slab.data_ptr())
