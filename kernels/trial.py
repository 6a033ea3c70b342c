"""One tiny kernel, launched to see whether this machine's driver runs what Triton compiles; and what to do if not.

Triton assembles machine code with a ptxas of its own, which may be newer than the driver: such a driver refuses to load
the code, and says so in words that help nobody ("device kernel image is invalid"). Which ptxas Triton takes, and by
which variable another one is named, depends on the card: see ``assembler``.
"""

# ruff: noqa: ANN001, ANN202 (the parameters of kernels are typed by Triton, at launch)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload_triforce.kernels.launch import Launch, run

NUMBERS = 16
# What the driver says of code that it does not take: CUDA's errors 200, 209, 218, 222 and 300 in its own words.
_REFUSED = ("image is invalid", "no kernel image", "ptx jit", "invalid ptx", "unsupported toolchain", "invalid source")
_NO_COMPILER = ("c compiler", "python.h", "gcc", "clang", " cc ")
TORCH_INSTEAD = "or set OFFLOAD_TRIFORCE_KERNELS=torch, which is slower"


class Obstacle(NamedTuple):
    """Why Triton's kernels do not run here, in Triton's or the driver's own words; and what helps."""

    reason: str
    remedy: str


@triton.jit
def _double_kernel(numbers, doubled, NUMBERS: tl.constexpr):
    """``doubled`` = 2 x ``numbers``, both float32 [NUMBERS]."""
    place = tl.arange(0, NUMBERS)
    tl.store(doubled + place, 2 * tl.load(numbers + place))


def double(numbers: Tensor) -> Tensor:
    """Twice the numbers, float32 [NUMBERS], by a kernel."""
    doubled = torch.empty_like(numbers)
    run(Launch(_double_kernel, (1, 1, 1), (numbers, doubled, NUMBERS), {"num_warps": 1}))
    return doubled


def find_obstacle() -> Obstacle | None:
    """Compile, load and launch a kernel on the current GPU, and look at what it wrote; None if all is well."""
    try:
        device = triton.runtime.driver.active.get_active_torch_device()
        numbers = torch.arange(NUMBERS, dtype=torch.float32, device=device)
        doubled = double(numbers).tolist()
    except Exception as error:  # whatever it is: the first real kernel would meet it too
        return _explain(error)
    if doubled != [2.0 * number for number in range(NUMBERS)]:
        return Obstacle("a kernel ran, but wrote wrong numbers", f"install NVIDIA's newest driver, {TORCH_INSTEAD}")
    return None


def _explain(error: Exception) -> Obstacle:
    said = str(error).strip()
    reason = (said or type(error).__name__).splitlines()[0]
    if any(words in said.lower() for words in _REFUSED):
        variable, version = assembler()
        remedy = (
            f"install a newer NVIDIA driver; or set {variable} to the ptxas of a CUDA toolkit no newer than the CUDA "
            f"version that nvidia-smi shows (Triton's own ptxas is of CUDA {version}); or install an older triton; "
            f"{TORCH_INSTEAD}"
        )
    elif type(error).__name__ == "PTXASError":
        variable, version = assembler()
        remedy = (
            f"set {variable} to a ptxas that knows this card (Triton runs one of CUDA {version}), or unset it where it "
            f"is set; {TORCH_INSTEAD}"
        )
    elif any(words in said.lower() for words in _NO_COMPILER):
        remedy = f"install a C compiler and Python's headers (apt install gcc python3-dev), {TORCH_INSTEAD}"
    else:
        remedy = f"update NVIDIA's driver and triton, {TORCH_INSTEAD}"
    return Obstacle(reason, remedy)


def assembler() -> tuple[str, str]:
    """The variable that names another ptxas for the current card, and the CUDA version of the one that Triton runs.

    Triton has two of them, an older one for older cards: where the line lies is its own affair, and has moved.
    """
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        tool = get_ptxas(triton.runtime.driver.active.get_current_target().arch)
        newer = triton.knobs.nvidia.ptxas_blackwell.path
        return f"TRITON_PTXAS{'_BLACKWELL' if tool.path == newer else ''}_PATH", tool.version
    except Exception:  # a Triton that keeps it elsewhere, or one that finds no ptxas at all
        return "TRITON_PTXAS_PATH (cards of the RTX 50 series: TRITON_PTXAS_BLACKWELL_PATH)", "unknown"
