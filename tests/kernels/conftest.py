"""Where the Triton kernels are tested: on the GPU if there is one, else on the CPU by Triton's interpreter."""

import mmap

import pytest
import torch

MAP_NORESERVE = 0x4000  # Linux: no promise of memory is made for what is not used; Python names it from 3.13 on


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def arena(device):
    """``arena(values, strides)``: a copy with any strides, in a space of which only what is used exists.

    It begins in the middle of the space, so that an offset that wraps around reads zeros rather than crashing.
    """
    if device.type == "cuda":
        size = min(9 << 31, torch.cuda.mem_get_info()[0] // 8 * 7) >> 20 << 20
        space = torch.empty(size, dtype=torch.uint8, device=device)
    else:
        size = 1 << 36
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        space = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=torch.uint8)
    taken = 0

    def place(values, strides):
        nonlocal taken
        end = sum((length - 1) * stride for length, stride in zip(values.shape, strides, strict=True)) + 1
        middle = size // 2 // values.itemsize
        if middle + taken + end > size // values.itemsize:
            pytest.skip("needs more GPU memory")
        tensor = space.view(values.dtype).as_strided(values.shape, strides, middle + taken)
        taken += 4096
        return tensor.copy_(values)

    return place
