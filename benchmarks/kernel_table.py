"""How long the kernels of one tile take, computed from their machine code. Nothing here is measured.

Every kernel of a pass with refresh is compiled for the card, and the instructions of its main loop are counted. What a
step of that loop takes follows from four things that a quarter of a multiprocessor does at its own rate, for the warps
that it has at once:

    matrix   32 cycles for a product of 16 x 8 x 16 added up in float32: on GeForce cards half the rate of the others
    issue    one instruction of one warp per cycle
    special  8 cycles for the 32 exponentials of a warp
    shared   one access of 128 bytes per cycle, of all warps of the multiprocessor

"low" is the longest of the four, as if the others were hidden behind it; "high" is matrix and issue one after the
other, and the barriers, as if nothing overlapped. Two warps per quarter overlap a good deal, so the truth should lie
between, nearer to the low end. Blocks come in waves of as many as fit at once (registers, shared memory); before and
after its steps a block fetches and stores its queries, keys or state, at its share of the second-level cache and with
some waiting. No tile takes less than reading it once from memory, nor than reading it from the second-level cache by
every block of rows.

A tile is 16.8 MB of one layer's keys and values, which takes the link 671 microseconds at 25 GB/s and 305 at 55.

    python -m benchmarks.kernel_table [--card 4090] [--json benchmarks/results/kernel_table_computed.json]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from offload_triforce.kernels import aot, aot_cases, machine_code, tiling
from offload_triforce.kernels.launch import Launch
from offload_triforce.machine.cards import find_card

CHUNK, BUDGET, CLAIM = 8, 4096, 0.8
NODES = (13, 49, 193, 512)
LINKS = (25, 55)  # GB/s
# Query heads, KV heads, head dimension.
MODELS = {"Llama-2-7B": (32, 32, 128), "Llama-3.1-8B": (32, 8, 128), "Qwen2.5-7B": (28, 4, 128)}

WAIT = 800  # cycles until something comes from memory
BARRIER = 40  # cycles
REDUCTION = 120  # cycles, over all threads of a block
ENTERING = 32  # chunks per KV head and tile, in the dearer case: when a choice has settled, hardly any


@dataclass(frozen=True)
class Card:
    """``memory`` and ``cache`` (the second level; an assumption) in bytes per second, ``clock`` in Hz.

    With these clocks and 32 cycles per product, the makers' figures for float16 with float32 sums come out: 71, 165
    and 209 teraflops.
    """

    name: str
    cc: int
    multiprocessors: int
    clock: float
    memory: float
    cache: float
    matrix: int = 32


def _card(short: str, cache: float) -> Card:
    """The planner's own figures, and the one that it does not have."""
    known = find_card(f"RTX {short}")
    return Card(known.name, known.cc, known.sms, known.mhz * 1e6, known.memory_gbps * 1e9, cache)


CARDS = {short: _card(short, cache) for short, cache in (("3090", 2e12), ("4090", 4e12), ("5090", 5e12))}


@dataclass(frozen=True)
class Range:
    """Microseconds, from and to."""

    low: float
    high: float

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.high + other.high)

    def __str__(self) -> str:
        return f"{self.low:.0f}-{self.high:.0f}"


def step(kernel: aot.Compiled, card: Card, blocks: int) -> tuple[float, float, str]:
    """Cycles of one step of the main loop with so many blocks on a multiprocessor: low, high, and what sets the low."""
    counts = kernel.loop.counts
    warps = kernel.warps * blocks
    per_quarter = warps / 4
    pipes = {
        "matrix": per_quarter * kernel.loop.matrix * card.matrix,
        "issue": per_quarter * kernel.loop.total,
        "special": per_quarter * counts["MUFU"] * 8,
        "shared": warps * (4 * counts["LDSM"] + 2 * (counts["LDS"] + counts["STS"])),
    }
    limit = max(pipes, key=pipes.__getitem__)
    others = pipes["issue"] - per_quarter * kernel.loop.matrix
    return pipes[limit], pipes["matrix"] + others + BARRIER * kernel.loop.barriers, limit


def resident(kernel: aot.Compiled) -> int:
    """Blocks that fit a multiprocessor: 65,536 registers, and 100 KB of which a block takes 1 KB more than it says."""
    registers = 32 * kernel.warps * -(-kernel.registers // 8) * 8
    return max(1, min(65536 // registers, 102400 // (kernel.shared + 1024), 48 // kernel.warps))


def waves(kernel: aot.Compiled, card: Card, grid: int, steps: int, ends: float) -> tuple[Range, str]:
    """A launch of ``grid`` blocks of so many steps each; ``ends``: bytes per block before and after them."""
    most = resident(kernel)
    full, rest = divmod(grid, card.multiprocessors * most)
    low = high = 0.0
    for count, blocks in ((full, most), (rest > 0, -(-rest // card.multiprocessors))):
        if count:
            fetched = blocks * ends * card.clock * card.multiprocessors / card.cache
            one = step(kernel, card, blocks)
            low += count * (steps * one[0] + fetched)
            high += count * (steps * one[1] + fetched + 4 * WAIT)
    return Range(low / card.clock * 1e6, high / card.clock * 1e6), step(kernel, card, most)[2]


def attention(card: Card, heads: int, kv_heads: int, dim: int, nodes: int) -> dict[str, Any]:
    rows, tokens = heads // kv_heads * nodes, tiling.TILE_BYTES // (4 * kv_heads * dim)
    kernel = aot.build(aot_cases.update(torch.bfloat16, dim, rows, heads=kv_heads, n=tokens), card.cc)
    cut, splits = tiling.tiling(rows, dim, 2), tiling.best_splits(kv_heads, rows, dim, 2, card.multiprocessors)
    row_blocks = -(-rows // cut.rows)
    steps = -(-(tokens // cut.keys) // splits)
    time, limit = waves(kernel, card, row_blocks * kv_heads * splits, steps, cut.rows * dim * (2 + 4 + 4))
    floors = {"memory": tiling.TILE_BYTES / card.memory, "cache": row_blocks * tiling.TILE_BYTES / card.cache}
    for name, floor in floors.items():
        if floor * 1e6 > time.low:
            time, limit = Range(floor * 1e6, max(time.high, floor * 1e6)), name
    peak = 4 * heads * nodes * tokens * dim / (4 * card.multiprocessors * card.clock / card.matrix * 4096) * 1e6
    grid = [row_blocks, kv_heads, splits]
    return {"time": time, "limit": limit, "grid": grid, "at_peak_us": peak, **facts(kernel)}


def scoring(card: Card, heads: int, kv_heads: int, dim: int, nodes: int) -> dict[str, Any]:
    rows, tokens = heads // kv_heads * nodes, tiling.TILE_BYTES // (4 * kv_heads * dim)
    launch = aot_cases.scores(torch.bfloat16, dim, rows, CHUNK, kv_heads, tokens)
    kernel, sizes = aot.build(launch, card.cc), named(launch)
    time, limit = waves(
        kernel, card, math.prod(launch.grid), -(-rows // sizes["BLOCK_ROWS"]), 2 * sizes["BLOCK"] * CHUNK * dim
    )
    floor = tiling.TILE_BYTES / 2 / card.memory * 1e6  # the keys, if they are no longer in the second-level cache
    if floor > time.high:
        limit = "memory"
    return {"time": Range(time.low, max(time.high, floor)), "limit": limit, "grid": launch.grid, **facts(kernel)}


def selection(card: Card, kv_heads: int, dim: int) -> dict[str, Any]:
    """The choice, and packing: waiting for the most part. Low: nothing enters; high: ENTERING chunks per KV head."""
    tokens = tiling.TILE_BYTES // (4 * kv_heads * dim)
    launch = aot_cases.take(torch.bfloat16, dim, CHUNK, 4, BUDGET // CHUNK, tokens // CHUNK, kv_heads)
    kernel = aot.build(launch, card.cc)
    code = machine_code.loops(aot.compile_launch(launch, card.cc).asm["cubin"])
    bits = min(code, key=lambda loop: loop.total)  # the search for the bound, bit by bit
    pack = min((loop for loop in code if loop.counts["F2I"]), key=lambda loop: loop.total)
    look = 2 * WAIT + 2 * REDUCTION
    search = 31 * (bits.total * kernel.warps / 4 + REDUCTION) + 4 * REDUCTION
    packing = -(-ENTERING // launch.grid[0]) * (pack.total * kernel.warps / 4 + pack.barriers * BARRIER + 3 * WAIT)
    high = look + search + packing + 2 * WAIT
    return {"time": Range(look / card.clock * 1e6, high / card.clock * 1e6), "limit": "waiting", "grid": launch.grid}


def named(launch: Launch) -> dict[str, Any]:
    return dict(zip(launch.kernel.arg_names, launch.arguments, strict=True))


def facts(kernel: aot.Compiled) -> dict[str, Any]:
    loop = kernel.loop
    return {
        "registers": kernel.registers,
        "local": kernel.local,
        "shared": kernel.shared,
        "blocks_at_once": resident(kernel),
        "instructions_per_matrix": round(loop.total / loop.matrix, 2),
    }


def row(card: Card, model: str, nodes: int) -> dict[str, Any]:
    heads, kv_heads, dim = MODELS[model]
    parts = {
        "attention": attention(card, heads, kv_heads, dim, nodes),
        "scores": scoring(card, heads, kv_heads, dim, nodes),
        "selection": selection(card, kv_heads, dim),
    }
    total = sum((part["time"] for part in parts.values()), Range(0, 0))
    slowest = max(parts, key=lambda name: parts[name]["time"].high)
    return {
        "model": model,
        "nodes": nodes,
        **{name: part | {"time": asdict(part["time"])} for name, part in parts.items()},
        "total": asdict(total),
        "share_of_link": {str(gbps): total.high / link(gbps) for gbps in LINKS},
        "limit": f"{slowest}: {parts[slowest]['limit']}",
    }


def link(gbps: int) -> float:
    """Microseconds of one tile."""
    return tiling.TILE_BYTES / gbps / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=CARDS, default="4090")
    parser.add_argument("--nodes", type=int, nargs="+", default=list(NODES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if machine_code.disassembler() is None:
        sys.exit("error: this Triton comes without cuobjdump, so instructions cannot be counted")
    card = CARDS[options.card]
    rows = [row(card, model, nodes) for nodes in options.nodes for model in MODELS]
    print(f"{card.name}, computed, microseconds per tile; the link takes {', '.join(f'{link(x):.0f}' for x in LINKS)}")
    for each in rows:
        times = " ".join(f"{Range(**each[name]['time'])!s:>9}" for name in ("attention", "scores", "selection"))
        shares = ", ".join(f"{share:.0%} at {gbps} GB/s" for gbps, share in each["share_of_link"].items())
        print(f"{each['nodes']:4} {each['model']:13} {times}  at most {shares}; {each['limit']}")
    if options.json:
        about = "computed from machine code by benchmarks/kernel_table.py; nothing was measured"
        report = {"computed": True, "about": about, "card": asdict(card), "tile_bytes": tiling.TILE_BYTES, "rows": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    late = [each for each in rows if each["nodes"] <= 193 and each["share_of_link"]["25"] > CLAIM]
    sys.exit(int(bool(late) and options.card == "4090"))


if __name__ == "__main__":
    main()
