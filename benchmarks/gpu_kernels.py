"""The kernels alone: how much of a tile's time on the link each of them takes, at several sizes of the tree.

CUDA graphs of many launches are replayed, so that launching from Python does not count. On a CPU the eager twins run,
as a rehearsal; the numbers then mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offload_triforce.cache.chunks import make_store
from offload_triforce.kernels import ops
from offload_triforce.kernels.wire_format import WireFormat
from offload_triforce.machine.measure import seconds, synchronize
from offload_triforce.scheduler.plan import TilePlan

NODES = (1, 13, 49, 193, 512)
BITS = 4


@dataclass(frozen=True)
class Bench:
    """A layer: query heads, tiles of keys and values, and a retrieval cache of ``slots`` chunks."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    plan: TilePlan
    slots: int
    chunk: int

    def tiles(self) -> Tensor:
        """About half a gigabyte of them, [n, 2, K, tokens, D]: more than the second-level cache holds."""
        plan = self.plan
        count = max(2, min(32, (1 << 29) // plan.tile_bytes)) if self.device.type == "cuda" else 2
        shape = (count, 2, plan.kv_heads, plan.tile_tokens, plan.head_dim)
        return torch.randn(shape, dtype=self.dtype, device=self.device)


def kernels(bench: Bench, link_gbps: float, nodes: tuple[int, ...] = NODES) -> list[dict[str, Any]]:
    """Microseconds of each kernel at each number of nodes, and their shares of the time of one tile on the link."""
    tiles = bench.tiles()
    rows = []
    for count in nodes:
        for name, number, work in _works(bench, tiles, count):
            started = time.perf_counter()
            work()  # compiles
            synchronize(bench.device)
            first = time.perf_counter() - started
            taken = seconds(bench.device, _replayable(bench.device, work), 5) / number
            row = {"kernel": name, "nodes": count, "us": 1e6 * taken, "first_call_s": first}
            shares = {f"{gbps:g}": taken * gbps * 1e9 / bench.plan.tile_bytes for gbps in (link_gbps, 25.0, 55.0)}
            rows.append(row | {"share_of_link": shares[f"{link_gbps:g}"], "share_by_gbps": shares})
    return rows


def _works(bench: Bench, tiles: Tensor, nodes: int) -> Iterator[tuple[str, int, Callable[[], None]]]:
    """Name, how many times it is done in one call, and the call."""
    plan, chunk = bench.plan, bench.chunk
    query = torch.randn(bench.heads, nodes, plan.head_dim, dtype=bench.dtype, device=bench.device)
    params, per_tile = ops.AttentionParams(plan.head_dim**-0.5), plan.tile_tokens // chunk
    attention = ops.RunningAttention()

    def attend() -> None:
        attention.start(query, plan.kv_heads, params)
        for tile in tiles:
            attention.update(tile[0], tile[1])
        attention.finish()

    yield "attention", len(tiles), attend
    packed, baseline = attention.packed, attention.logsumexp()

    def score() -> None:
        for tile in tiles:
            ops.chunk_scores(packed, tile[0], chunk, params.scaling, baseline)

    yield "chunk scores", len(tiles), score
    store = make_store(1, plan.kv_heads, bench.slots, chunk, plan.head_dim, BITS, bench.dtype, bench.device)
    store.calibrate(0, tiles[0, 0])
    scores = ops.chunk_scores(packed, tiles[0, 0], chunk, params.scaling, baseline)
    choice = _choice(bench, len(tiles) * per_tile)

    def select(offered: Tensor) -> None:
        for i, tile in enumerate(tiles):
            ops.take_chunks(choice, offered, i * per_tile, tile, store.slots(0))

    select(scores)
    nothing = torch.full_like(scores, -1e30)
    yield "selection, none enters", len(tiles), lambda: select(nothing)

    def enter() -> None:
        choice.scores.fill_(float("-inf"))
        choice.held.fill_(False)
        select(scores)

    yield "selection, all enter", len(tiles), enter

    def attend_packed() -> None:
        attention.start(query, plan.kv_heads, params)
        attention.update(tiles[0, 0, :, :chunk], tiles[0, 1, :, :chunk])
        store.attend_on(attention, 0, bench.slots)
        attention.finish()

    yield "packed attention", 1, attend_packed
    if nodes == NODES[0] and WireFormat.serves(plan.tile_tokens, bench.dtype):
        yield from _coding(bench, tiles)


def _coding(bench: Bench, tiles: Tensor) -> Iterator[tuple[str, int, Callable[[], None]]]:
    """Tiles on their way to host memory and back: of random values, which are coded like a model's."""
    form = WireFormat(bench.plan.kv_heads, bench.plan.tile_tokens, bench.plan.head_dim, bench.dtype)
    coded = torch.empty(len(tiles), form.bytes, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(tiles[0])

    def encode() -> None:
        for tile, place in zip(tiles, coded, strict=True):
            ops.wire_encode(tile, place, form)

    def decode() -> None:
        for place in coded:
            ops.wire_decode(place, target, form)

    yield "coding of a tile", len(tiles), encode
    yield "decoding of a tile", len(tiles), decode


def _choice(bench: Bench, chunks: int) -> ops.ChunkSelection:
    shape = bench.plan.kv_heads, bench.slots
    return ops.ChunkSelection(
        torch.full(shape, float("-inf"), device=bench.device),
        torch.full(shape, -1, dtype=torch.long, device=bench.device),
        torch.zeros(bench.plan.kv_heads, chunks + 1, dtype=torch.bool, device=bench.device),
    )


def _replayable(device: torch.device, work: Callable[[], None]) -> Callable[[], object]:
    """The same work as a CUDA graph; on a CPU, the work itself."""
    work()  # lets what settles settle
    if device.type != "cuda":
        return work
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
