"""Reading small tensors out of pinned host memory: the device's own loads, which wait for no copy.

The link has one copy engine for each direction, and it copies in turn. What a step of the retrieval level is given
(tokens, positions, masks: a few kilobytes) would wait there for tiles that were asked for before it, 0.7 ms each at
25 GB/s. Loads of a kernel go over the link between the packets of a copy. Pinned memory has the same address on the
device as on the host, wherever CUDA runs on 64 bits.
"""

# ruff: noqa: ANN001, ANN202 (the parameters of kernels are typed by Triton, at launch)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload_triforce.kernels.launch import Bound, Launch, aligned, run

BLOCK = 1024  # words of a block

_BOUND: dict[tuple[torch.dtype, int, torch.device], Bound] = {}


@triton.jit(do_not_specialize=["count"])
def _fetch_kernel(source, target, count, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    # Past the caches: the host writes to the same place for step after step.
    tl.store(target + places, tl.load(source + places, mask=inside, cache_modifier=".cv"), mask=inside)


def fetch_launch(target: Tensor, source: Tensor) -> Launch:
    """The launch that reads all of ``source`` into ``target``, flat tensors of one length and dtype."""
    count = source.numel()
    return Launch(_fetch_kernel, (triton.cdiv(count, BLOCK), 1, 1), (source, target, count, BLOCK), {"num_warps": 4})


def words(tensor: Tensor) -> Tensor:
    """A contiguous tensor as words of eight bytes, or as bytes where they are not whole."""
    flat = tensor.view(-1)
    return flat.view(torch.uint8 if tensor.nbytes % 8 or tensor.data_ptr() % 8 else torch.int64)


def fetch(target: Tensor, source: Tensor) -> None:
    """See ``ops.fetch``."""
    if target.dtype != source.dtype or target.shape != source.shape:
        raise ValueError(f"{source.dtype} {list(source.shape)} does not fit {target.dtype} {list(target.shape)}")
    if not source.numel():
        return
    host, there = words(source), words(target)
    if host.dtype != there.dtype:
        host, there = source.view(-1).view(torch.uint8), target.view(-1).view(torch.uint8)
    launch = fetch_launch(there, host)
    if not aligned(host, there):
        run(launch)
        return
    kind = (host.dtype, launch.grid[0], target.device)
    bound = _BOUND.get(kind)
    if bound is None:
        _BOUND[kind] = Bound(launch, ("source", "target", "count"))
    else:
        bound(host, there, host.numel())
