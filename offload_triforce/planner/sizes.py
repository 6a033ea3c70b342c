"""How a context is cut into tiles, and a budget into chunks: from settings alone, for planning and running alike."""

from __future__ import annotations

import math

from offload_triforce.cache.sizes import RetrievalShape
from offload_triforce.config import Settings
from offload_triforce.errors import InputError
from offload_triforce.model.outline import ModelLayout
from offload_triforce.scheduler.plan import RING_LIMIT, TilePlan, choose_ring, choose_tile


def make_plan(layout: ModelLayout, settings: Settings, context: int) -> TilePlan | None:
    """The tiles of a model at a context of that many tokens; None if all its layers have a sliding window.

    Raises:
        InputError: the ring that the settings ask for is larger than it may be.
    """
    if not layout.full:
        return None
    shape = layout.layers[layout.full[0]]
    token_bytes = layout.token_bytes(layout.full[0])
    tile = settings.tile or choose_tile(token_bytes, context, math.lcm(settings.chunk, settings.sink or 1))
    ring = settings.ring or choose_ring(tile * token_bytes)
    if ring * tile * token_bytes > RING_LIMIT:
        raise InputError(
            f"a ring of {ring} tiles of {tile} tokens takes {ring * tile * token_bytes / 1e6:,.0f} MB on the device, "
            f"more than the {RING_LIMIT / 1e6:,.0f} MB that it may; at most {RING_LIMIT // token_bytes:,} tokens fit"
        )
    return TilePlan(
        layers=len(layout.full),
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        itemsize=layout.dtype.itemsize,
        tile_tokens=tile,
        tiles=-(-context // tile),
        ring=ring,
        resident=settings.resident or 0.0,
    )


def make_shape(settings: Settings, context: int) -> RetrievalShape:
    """How the retrieval cache's budget is spent at a context of that many tokens."""
    return RetrievalShape(settings.budget_for(context), settings.chunk, settings.sink, settings.recent, settings.bits)
