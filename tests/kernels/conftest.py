"""Where the Triton kernels are tested: on the GPU if there is one, else on the CPU by Triton's interpreter."""

import mmap

import pytest
import torch

ARENA = 1 << 33  # bytes


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def arena(device):
    """``arena(dtype, shape, strides)``: a tensor of any strides in a space of 8 GB, of which only what is used exists.

    Its first element is in the middle, so that an offset that wraps around reads zeros rather than crashing.
    """
    if device.type == "cuda":
        if torch.cuda.mem_get_info()[0] < ARENA + (1 << 30):
            pytest.skip("needs 9 GB of free GPU memory")
        space = torch.zeros(ARENA, dtype=torch.uint8, device=device)
    else:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_NORESERVE
        space = torch.frombuffer(mmap.mmap(-1, ARENA, flags=flags), dtype=torch.uint8)
    taken = 0

    def place(values, strides):
        """A copy of ``values`` with these strides, and after the tensors placed before."""
        nonlocal taken
        view = space.view(values.dtype)
        tensor = view.as_strided(values.shape, strides, len(view) // 2 + taken)
        taken += 4096
        return tensor.copy_(values)

    return place
