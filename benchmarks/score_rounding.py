"""Whether it matters for acceptance that the mean keys of chunks are rounded to 16 bits before they are scored.

Tensor cores want both factors of a product in 16 bits, so the kernel and its eager twin round mean keys to the dtype
of the keys; the product itself is summed in float32. Here SmolLM2-135M-Instruct reads about 6,000 tokens of source
code in float32, and the choice for its retrieval level is made in three ways: from float32 as it is; from queries and
keys in bfloat16, as a model of 16 bits has them, with means in float32; and with means rounded, as the kernels do it.
Everything else is ``python -m benchmarks.retrieval``.

    python -m benchmarks.score_rounding [--measured 512] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import retrieval_level
from benchmarks.retrieval_figures import make_row
from benchmarks.retrieval_level import ChosenLevel, FullText
from benchmarks.retrieval_study import measure
from benchmarks.retrieval_ways import LEAST_BUDGET, chunk_scores, make_ways, near_baseline
from offload_triforce import TriForce
from offload_triforce.bench.speculation import SHARE
from offload_triforce.bench.tasks import find_task, prompts
from offload_triforce.config import Settings
from offload_triforce.kernels import ops
from offload_triforce.machine.describe import describe_machine
from offload_triforce.model.adapter import attached
from offload_triforce.model.fetch import fetch_model
from offload_triforce.runtime.reading import Reading

WAYS = ("float32", "bfloat16, means in float32", "bfloat16, means rounded")


def scores(way, queries, keys, scaling, refreshed, near=None):
    """``retrieval_ways.chunk_scores`` for the ways above."""
    if way.name == WAYS[0]:
        return chunk_scores(way, queries, keys, scaling, refreshed, near)
    shape, heads, asking = way.shape, keys.shape[0], queries.shape[1]
    pool, chunk = shape.pool(refreshed), shape.chunk
    near = max(0, min(keys.shape[1] - asking, refreshed - shape.recent))
    packed = ops.pack_queries(queries[:, -way.queries :], heads)
    part = keys[:, pool.start * chunk : pool.stop * chunk].bfloat16()
    baseline = near_baseline(packed, keys, min(asking, way.queries), shape.sink, near, scaling)
    packed = packed.bfloat16()
    if way.name == WAYS[1]:
        packed, part = packed.float(), part.float()
    return ops.chunk_scores(packed, part, chunk, scaling, baseline)


def compare(tokens: int, measured: int) -> dict:
    engine = TriForce.load(fetch_model("smollm2"), dtype="float32", context=tokens + measured)
    task = find_task("continue")
    ids = prompts(engine.tokenizer, [task], tokens + measured - 1)[task][: tokens + measured]
    head_dim = engine.layout.attention[0].head_dim
    usual = make_ways(Settings(), max(LEAST_BUDGET, tokens // SHARE), head_dim)[0]
    reading = Reading.of(engine.model, engine.layout, ids[:-measured])
    retrieval_level.chunk_scores = scores
    with attached(engine.model), torch.no_grad():
        text = FullText(engine.model, engine.layout, reading, measured)
        levels = [ChosenLevel(replace(usual, name=name, about="rounding"), text) for name in WAYS]
        same = [0, 0]
        tallies = measure(text, ids[-measured:], levels, lambda line: note_choices(line, levels, same))
    rows = [make_row(level, tally, tallies[1], head_dim) for level, tally in zip(levels, tallies, strict=True)]
    return {
        "machine": describe_machine(),
        "tokens": tokens,
        "measured": measured,
        "same_chunks": same[0] / same[1],
        "rows": rows,
    }


def note_choices(line: str, levels: list[ChosenLevel], same: list[int]) -> None:
    """Count how many of the chunks chosen with rounded means are those chosen without."""
    print(line, flush=True)
    for one, other in zip(levels[1].chosen, levels[2].chosen, strict=True):
        for ours, theirs in zip(one.tolist(), other.tolist(), strict=True):
            same[0] += len(set(ours) & set(theirs))
            same[1] += len(ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--measured", type=int, default=512)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = compare(options.tokens, options.measured)
    for row in report["rows"]:
        change = row["change"]["0.6"]
        error = math.nan if change["error"] is None else change["error"]
        print(
            f"{row['way']:28} attention held {row['mass']:.4f}  acceptance {row['acceptance']['0.6']:.4f} (T 0.6) "
            f"{row['acceptance']['1']:.4f} (T 1)  change {change['mean']:+.5f} +- {error:.5f}"
        )
    print(f"chunks chosen alike with rounded means and without: {report['same_chunks']:.4%}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
