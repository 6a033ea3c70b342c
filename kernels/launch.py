"""Launching a kernel again and again with other pointers, past Triton's binder.

``kernel[grid](*arguments)`` looks at every argument anew: 20 to 40 microseconds of Python per launch, which is more
than the driver needs for it. A pass launches the same kernels for tile after tile, of which only a few pointers differ.
So the first launch goes Triton's way, and those after it go straight to the compiled kernel's own launcher, with all
other arguments bound. That launcher takes the same arguments from Triton 3.6 to 3.9.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
from torch import Tensor

# What every kernel is compiled with. Triton 3.10 will no longer fuse multiplication and addition unless it is told to.
OPTIONS = {"enable_fp_fusion": True}

ALIGNMENT = 16  # bytes


class Launch(NamedTuple):
    """What to launch: a kernel, its grid, all its arguments in order, and Triton's options."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def run(launch: Launch) -> Any:
    """Launch in Triton's own way, on the current stream. Returns the compiled kernel; None from the interpreter."""
    return launch.kernel[launch.grid](*launch.arguments, **launch.options, **OPTIONS)


class Bound:
    """A launch that is repeated with other values of its ``changing`` parameters.

    ``lasting`` ones change now and then: they are those of the first launch, or what ``keep`` has put there since. What
    changes must not change what would be compiled: tensors keep their dtype and are ``aligned``, or parameters whose
    alignment the kernel does not specialise on; numbers are parameters that it does not specialise on at all.
    What stays the same is known by its address alone: whoever binds keeps it alive, or binds anew for another address.
    Profilers' launch hooks are passed by.
    """

    def __init__(self, launch: Launch, changing: tuple[str, ...], lasting: tuple[str, ...] = ()) -> None:
        """Launches it once."""
        names = launch.kernel.arg_names
        self._places = [names.index(name) for name in changing]
        self._lasting = [names.index(name) for name in lasting]
        compiled = run(launch)
        self._launch = launch if compiled is None else None  # None from the interpreter, which goes Triton's way again
        # Addresses, not tensors: faster, and none of them is kept alive.
        self._arguments = list(map(self._value, launch.arguments))
        if compiled is not None:
            driver = triton.runtime.driver.active
            self._device, self._stream = driver.get_current_device(), driver.get_current_stream
            self._run, self._grid = compiled.run, launch.grid
            self._fixed = (compiled.function, compiled.packed_metadata, None, None, None)

    def keep(self, *values: Tensor | int) -> None:
        """The lasting parameters, from the next launch on."""
        for place, value in zip(self._lasting, values, strict=True):
            self._arguments[place] = self._value(value)

    def __call__(self, *values: Tensor | int) -> None:
        """Launch it with these values, on the current stream."""
        arguments = self._arguments
        if self._launch is not None:
            for place, value in zip(self._places, values, strict=True):
                arguments[place] = value
            self.again()
            return
        for place, value in zip(self._places, values, strict=True):  # not by ``_value``: a call costs as much again
            arguments[place] = value.data_ptr() if isinstance(value, Tensor) else value
        self._run(*self._grid, self._stream(self._device), *self._fixed, *arguments)  # nor by ``again``

    def again(self) -> None:
        """Launch it with the values of the last time, on the current stream."""
        if self._launch is not None:
            run(self._launch._replace(arguments=tuple(self._arguments)))
        else:
            self._run(*self._grid, self._stream(self._device), *self._fixed, *self._arguments)

    def _value(self, value: Any) -> Any:
        return value.data_ptr() if self._launch is None and isinstance(value, Tensor) else value


def aligned(*tensors: Tensor) -> bool:
    """Whether all of them begin where Triton's compiled kernels expect it: at a multiple of 16 bytes."""
    return not any(tensor.data_ptr() % ALIGNMENT for tensor in tensors)


def check_rows(*tensors: Tensor) -> None:
    """The kernels take the last dimension to be contiguous, which every caller's buffer is."""
    for tensor in tensors:
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"last dimension of a tensor of shape {list(tensor.shape)} has stride {tensor.stride(-1)}")
