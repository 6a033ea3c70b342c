"""How long decoding a tile takes a card, computed from machine code. Nothing here is measured.

The kernel is compiled for the card, and the instructions of its loop over groups of 8 tokens are counted. "Issue" is
one instruction of one warp per cycle and quarter of a multiprocessor; "integer" takes two cycles for each, as if all
were integer instructions, which run at half the rate before Blackwell. "Memory" reads the coded tile and writes the raw
one once. Blocks overlap, so the truth should be near the largest of the three. A tile is 16.8 MB of one layer's keys
and values in bfloat16, which as it is takes the link 671 microseconds at 25 GB/s; coded, less by the rate.

    python -m benchmarks.wire_table [--json benchmarks/results/wire_table_computed.json]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from offload_triforce.kernels import aot, aot_cases, machine_code, tiling
from offload_triforce.kernels.wire_format import GROUP, WireFormat
from offload_triforce.machine.cards import find_card

CARDS = ("RTX 3090", "RTX 4090", "RTX 5070 Ti", "RTX 5090")
MODELS = {"Llama-2-7B": (32, 128), "Llama-3.1-8B": (8, 128), "Qwen3.6-27B": (4, 256), "SmolLM2": (3, 64)}
LINK = 25e9  # bytes per second
INTEGER_CYCLES = {86: 2, 89: 2, 90: 2, 120: 1}
CLAIM = 0.5


def decoding(card_name: str, heads: int, dim: int) -> dict[str, Any]:
    """Microseconds of decoding one tile."""
    card = find_card(card_name)
    tokens = tiling.TILE_BYTES // (4 * heads * dim) // GROUP * GROUP
    form = WireFormat(heads, tokens, dim, torch.bfloat16)
    kernel = aot.build(aot_cases.wire(torch.bfloat16, dim, heads, tokens)[-1], card.cc)
    groups = form.values // (GROUP * dim)
    issued = groups * kernel.longest * kernel.warps / (4 * card.sms * card.mhz)
    times = {
        "issue": issued,
        "integer": issued * INTEGER_CYCLES[card.cc],
        "memory": (form.raw_bytes + form.bytes) / card.memory_gbps / 1e3,
    }
    link = form.bytes / LINK * 1e6
    return {
        "card": card.name,
        "heads": heads,
        "dim": dim,
        "instructions_per_value": kernel.longest * kernel.warps * 32 / (GROUP * dim),
        "registers": kernel.registers,
        "local": kernel.local,
        "shared": kernel.shared,
        "microseconds": times,
        "link_microseconds": link,
        "share_of_link": max(times.values()) / link,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if machine_code.disassembler() is None:
        sys.exit("error: this Triton comes without cuobjdump, so instructions cannot be counted")
    rows = []
    for card in CARDS:
        for model, (heads, dim) in MODELS.items():
            row = decoding(card, heads, dim)
            rows.append({"model": model, **row})
            times = ", ".join(f"{name} {time:.0f}" for name, time in row["microseconds"].items())
            print(
                f"{card:12} {model:13} {times} us; {row['instructions_per_value']:.0f} instructions per value; "
                f"{row['share_of_link']:.0%} of the {row['link_microseconds']:.0f} us that the tile takes the link",
                flush=True,
            )
    if options.json:
        about = "computed from machine code by benchmarks/wire_table.py; nothing was measured"
        options.json.write_text(json.dumps({"computed": True, "about": about, "rows": rows}, indent=1) + "\n")
    sys.exit(int(any(row["share_of_link"] > CLAIM for row in rows)))


if __name__ == "__main__":
    main()
