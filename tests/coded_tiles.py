"""Tiles that can be coded, tiles that cannot, and plans whose tiles are."""

from __future__ import annotations

from dataclasses import replace

import torch

from offload_triforce.kernels.wire_format import WireFormat


def coded(plan, dtype):
    """The same plan with coded tiles."""
    return replace(plan, coded_bytes=WireFormat(plan.kv_heads, plan.tile_tokens, plan.head_dim, dtype).bytes)


def wild(shape, dtype, seed=0):
    """Numbers of all sizes beside each other: nothing to code them by, so that they do not fit."""
    chance = torch.Generator().manual_seed(seed)
    powers = torch.randint(-14, 15, shape, generator=chance)
    return (torch.randn(shape, generator=chance) * 2.0**powers).to(dtype)


def bits(kv):
    """The sum of all bit patterns, which a wrong bit changes."""
    return kv.contiguous().view({2: torch.int16, 4: torch.int32}[kv.element_size()]).long().sum()
