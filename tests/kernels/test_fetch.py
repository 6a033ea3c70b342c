"""Small tensors read by a kernel: every byte, and none beside them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_triforce.kernels import ops

triton_fetch = pytest.importorskip("offload_triforce.kernels.fetch")

DTYPES = (torch.int64, torch.int32, torch.bool, torch.uint8, torch.float32, torch.bfloat16)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 3000), st.sampled_from(DTYPES), st.integers(0, 5), st.integers(0, 5), st.integers(0, 10**6))
def test_every_byte_and_none_beside_them(device, count, dtype, start, there, seed):
    """Of any length, beginning anywhere in both memories."""
    chance = torch.Generator().manual_seed(seed)
    host = torch.randint(0, 256, (dtype.itemsize * (count + 8),), dtype=torch.uint8, generator=chance)
    host = (host % 2 if dtype is torch.bool else host).view(dtype)
    host = host.pin_memory() if device.type == "cuda" else host
    target = torch.full((dtype.itemsize * (count + 8),), 1, dtype=torch.uint8, device=device).view(dtype)
    before = target.clone()
    triton_fetch.fetch(target[there : there + count], host[start : start + count])
    before[there : there + count] = host[start : start + count].to(device)
    assert torch.equal(target.view(torch.uint8), before.view(torch.uint8))


def test_again_and_again_from_one_place(device):
    """What the host has written since is seen."""
    host, target = torch.zeros(2500, dtype=torch.int64), torch.zeros(2500, dtype=torch.int64, device=device)
    host = host.pin_memory() if device.type == "cuda" else host
    for number in range(4):
        host.fill_(number)
        triton_fetch.fetch(target, host)
        assert bool((target == number).all())


def test_other_shapes_are_refused(device):
    with pytest.raises(ValueError, match=r"torch.int64 \[3\] does not fit torch.int64 \[4\]"):
        triton_fetch.fetch(torch.zeros(4, dtype=torch.int64, device=device), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_which_of_the_two(monkeypatch, device, kernels):
    """Where Triton is forbidden, a copy."""
    launched = []
    monkeypatch.setenv(ops.CHOICE, kernels)
    monkeypatch.setattr(triton_fetch, "fetch", lambda target, source: launched.append(1) or target.copy_(source))
    target = torch.zeros(3, dtype=torch.int64, device=device)
    ops.fetch(target, torch.arange(3))
    assert target.tolist() == [0, 1, 2]
    assert len(launched) == (kernels == "triton")
