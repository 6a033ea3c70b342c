"""A CUDA device behind a slower link than its own: every copy drags ballast along.

After each copy the lane's stream copies some more, from a buffer of its own into another, so that both together take
as long as the copy alone takes on the slower link. That needs no clock, no waiting host and no busy kernel, and the
order of things stays what it is: the copy counts as landed when its ballast has. What the model's weights and
activations do is not slowed. Only bytes that are wanted are counted as moved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offload_triforce.scheduler.device import D2H, H2D, CudaDevice, CudaLane
from offload_triforce.scheduler.pinning import cuda_pin, cuda_unpin

BUFFER = 16 << 20


class BallastLane(CudaLane):
    """A lane that copies ``drag`` bytes of ballast for each byte, between two buffers of BUFFER bytes."""

    def __init__(self, owner: CudaDevice, name: str, drag: float, target: Tensor, source: Tensor) -> None:
        super().__init__(owner, name)
        self.drag, self.ballast = drag, 0
        self._buffers = target, source
        self._owed = 0.0  # less than a byte, from rounding

    def _copy(self, target: Tensor, source: Tensor) -> None:
        """A copy, and its ballast behind it."""
        super()._copy(target, source)
        self._owed += self.drag * source.nbytes
        left = int(self._owed)
        self._owed -= left
        self.ballast += left
        into, out_of = self._buffers
        while left > 0:
            part = min(left, len(into))
            into[:part].copy_(out_of[:part], non_blocking=True)
            left -= part


class BallastDevice(CudaDevice):
    """A CUDA device whose link gives ``gbps`` in each direction, less than the ``h2d`` and ``d2h`` that it has."""

    def __init__(self, device: torch.device, gbps: float, h2d: float, d2h: float) -> None:
        super().__init__(device)
        self._near = torch.zeros(2, BUFFER, dtype=torch.uint8, device=device)
        self._far = torch.zeros(2, BUFFER, dtype=torch.uint8, device="cpu")
        self._pin(self._far)
        self.incoming = BallastLane(self, H2D, drag(gbps, h2d), self._near[0], self._far[0])
        self.outgoing = BallastLane(self, D2H, drag(gbps, d2h), self._far[1], self._near[1])

    def close(self) -> None:
        """Let what is under way land."""
        try:
            super().close()
        finally:
            self._unpin(self._far)

    def _pin(self, buffer: Tensor) -> None:
        cuda_pin(buffer, self.device)

    def _unpin(self, buffer: Tensor) -> None:
        cuda_unpin(buffer)


def drag(wanted: float, real: float) -> float:
    """Bytes of ballast for each byte, to get ``wanted`` GB/s out of a link of ``real``; none where it is slower."""
    return max(0.0, real / wanted - 1.0)
