"""Capturing a step of fixed work: which steps are fit for it, and how CUDA does it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tag, Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# A forward step that reads its inputs from fixed places on the device; its logits.
Step = Callable[[], Tensor]
# Makes of a step one that does the same work on the same memory, and returns the same tensor each time.
Capture = Callable[[Step], Step]

# Largest tensor that a captured step may make: its memory is held for good. A model whose experts are copied for each
# token would otherwise take what the next prefill needs.
MOST_BYTES = 512 * 2**20

_aten = torch.ops.aten
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
_COPYING = {_aten._to_copy, _aten.copy_}


class NotFixedError(RuntimeError):
    """A step whose work depends on what it computes, or which takes too much memory: not to be captured."""


class FixedWork(TorchDispatchMode):
    """Refuses operations that make the host wait for the device.

    What the host learned from it while capturing would hold for all later steps. CUDA refuses most of them as well,
    but in the middle of a capture, which leaves torch's allocator and default generator in a state of capturing.
    Operations of other libraries are seen from outside alone; what they do inside, torch's own watch for CUDA sees.
    """

    def __init__(self, device: torch.device, most_bytes: int = MOST_BYTES) -> None:
        super().__init__()
        self._device, self._most_bytes = device, most_bytes
        self._watch = 0

    def __enter__(self) -> FixedWork:
        if self._device.type == "cuda":
            self._watch = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        if self._device.type == "cuda":
            torch.cuda.set_sync_debug_mode(self._watch)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation, or refuse it."""
        if self._asks(func, args):
            raise NotFixedError(f"{func} makes the host wait for the device")
        output = func(*args, **(kwargs or {}))
        if func.overloadpacket in _COPYING and output.device.type != _source(args).device.type:
            raise NotFixedError(f"{func} copies between {_source(args).device.type} and {output.device.type}")
        if isinstance(output, Tensor) and output.nbytes > self._most_bytes and not _aliases(func):
            raise NotFixedError(f"{func} makes a tensor of {output.nbytes / 1e9:.1f} GB, which a graph would hold")
        return output

    def _asks(self, func: Any, args: tuple[Any, ...]) -> bool:
        if not args or not isinstance(args[0], Tensor) or args[0].device.type != self._device.type:
            return False
        if func.overloadpacket in _INDEXING:  # a mask has to be counted; numbers do not
            return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        return Tag.data_dependent_output in func.tags or Tag.dynamic_output_shape in func.tags


def _source(args: tuple[Any, ...]) -> Tensor:
    """What ``_to_copy(source)`` or ``copy_(target, source)`` reads."""
    return args[1] if len(args) > 1 and isinstance(args[1], Tensor) else args[0]


def _aliases(func: Any) -> bool:
    """Whether the result is a view of an argument, or the argument itself."""
    return any(value.alias_info is not None for value in func._schema.returns)


def find_capture(device: torch.device) -> Capture | None:
    """How steps are captured on a device; None where that would gain nothing."""
    return CudaCapture(device) if device.type == "cuda" else None


class CudaCapture:
    """Captures steps as CUDA graphs which share one pool of memory: only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, step: Step) -> Step:
        """Capture a step. What a replay returns is good until the next replay of any graph of the pool."""
        main = torch.cuda.current_stream(self.device)
        # torch does not give the stream back when a capture fails, so it is set once more on the outside.
        with torch.cuda.device(self.device), torch.cuda.stream(main):
            self._stream.wait_stream(main)
            with torch.cuda.stream(self._stream):  # what is set up at first use must not be captured
                step()
            main.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Host memory may still be being pinned on another thread: that must not end the capture.
            try:
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    output = step()
            except BaseException:
                self._stop_pool()
                raise

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay

    def _stop_pool(self) -> None:
        """After a capture that failed, some versions of torch go on as if it were under way: nothing is freed then."""
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        with contextlib.suppress(RuntimeError, AttributeError):  # where torch has done it itself
            torch._C._cuda_endAllocateToPool(index, self._pool)
