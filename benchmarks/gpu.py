"""Everything that a CUDA machine has to say, as one JSON file.

    python -m benchmarks.gpu --out benchmarks/results/gpu_NAME.json

Models have well-known shapes and random weights, keys and values are random: for speed, their values do not matter.
The process is kept to --vram GB of device memory, so that a large card stands in for a small one. What does not fit
into the host's memory is skipped, with the reason. The file is written anew after every part, so nothing is lost when
a later one fails. ``--rehearse`` runs all of it on a CPU with a tiny model, to test the program; it writes no figures.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks import gpu_parts as gpu
from offload_triforce.bench import shapes
from offload_triforce.bench.subject import QUERIES
from offload_triforce.config import Settings
from offload_triforce.errors import MemoryLimitError
from offload_triforce.machine.describe import describe_machine
from offload_triforce.machine.measure import free_memory, link_ceiling, memory_bandwidth
from offload_triforce.machine.memory import free_on_host
from offload_triforce.model.layout import probe
from offload_triforce.planner.sizes import make_plan, make_shape, work_out

TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 1000}


def main() -> None:
    arguments = parse()
    if arguments.rehearse:
        shapes.SHAPES["tiny"] = (shapes.LlamaConfig, TINY)
        arguments.shapes, arguments.contexts, arguments.prefill_tokens = ["tiny"], [2048], 1024
    elif not torch.cuda.is_available():
        sys.exit("error: no CUDA device; --rehearse runs the program on a CPU")
    device = torch.device("cpu" if arguments.rehearse else "cuda")
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, arguments.vram * 1e9 / total))
    report: dict[str, Any] = {"machine": describe_machine(), "vram_cap_gb": arguments.vram, "models": []}
    report["hbm_gbps"] = memory_bandwidth(device, 1 << 26 if arguments.rehearse else 1 << 30)
    for shape in arguments.shapes:
        measure_model(shape, arguments, device, report)
    print(json.dumps(report, indent=1))
    if arguments.rehearse:
        failed = '"error"' in json.dumps(report)
        sys.exit("error: a part of the rehearsal failed" if failed else 0)


def measure_model(shape: str, arguments: argparse.Namespace, device: torch.device, report: dict[str, Any]) -> None:
    """All parts for one model; each that fails is written down as failed, and the next goes on."""
    dtype = torch.float32 if arguments.rehearse else torch.bfloat16
    out = None if arguments.rehearse else arguments.out
    model = shapes.random_model(shape, dtype, device, max(arguments.contexts) + 1024)
    for context in arguments.contexts:
        row: dict[str, Any] = {"shape": shape, "context": context, "dtype": str(dtype), "parts": {}}
        report["models"].append(row)
        measure_context(model, context, arguments.budget, row, Parts(row["parts"], report, out))
    parts = Parts(report.setdefault("prefill", {}).setdefault(shape, {}), report, out)
    parts.run("against_transformers", gpu.prefill_speed, model, Settings(), arguments.prefill_tokens)


def measure_context(model: PreTrainedModel, context: int, budget: int, row: dict[str, Any], parts: Parts) -> None:
    settings = Settings(budget=budget if context > 2 * budget else None)
    layout = probe(model)
    plan, shape = make_plan(layout, settings, context), make_shape(settings, context)
    row["plan"] = {"tile_tokens": plan.tile_tokens, "tile_bytes": plan.tile_bytes, "ring": plan.ring}
    parts.run("link", link_ceiling, model.device, plan.tile_bytes)
    for queries in (QUERIES, 64, 512):
        sizes = (queries, shape.slots, settings.chunk, parts.report["hbm_gbps"])
        parts.run(f"kernels_{queries}", gpu.kernel_time, model, plan, *sizes)
    needed = work_out(model, layout, settings, shape, plan, context).host
    free = free_on_host()
    if needed > 0.95 * free:
        row["skipped"] = f"{needed / 1e9:.1f} GB of host memory needed, {free / 1e9:.1f} GB free"
        return
    ceiling = row["parts"]["link"].get("h2d_gbps")
    if ceiling:
        for queries in (QUERIES, settings.block):
            parts.run(f"passes_{queries}", passes, model, settings, context, queries, ceiling)
    parts.run("memory", gpu.peak_memory, model, settings, context)


def passes(model: PreTrainedModel, settings: Settings, context: int, queries: int, ceiling: float) -> dict[str, Any]:
    subject = gpu.measured_subject(model, settings, context)
    try:
        return gpu.pass_time(subject, queries, ceiling) | {"level_1_step": gpu.step_time(subject, settings.width)}
    finally:
        subject.close()


class Parts:
    """Runs parts one by one, and writes the report after each."""

    def __init__(self, results: dict[str, Any], report: dict[str, Any], out: Path | None) -> None:
        self.results, self.report, self.out = results, report, out

    def run(self, name: str, part: Callable[..., Any], *args: Any) -> None:
        started = time.perf_counter()
        try:
            self.results[name] = part(*args)
        except MemoryLimitError as error:
            self.results[name] = {"skipped": str(error)}
        except Exception as error:
            traceback.print_exc()
            self.results[name] = {"error": f"{type(error).__name__}: {error}"}
        free_memory()
        print(f"{name}: {time.perf_counter() - started:.1f} s {self.results[name]}", file=sys.stderr, flush=True)
        if self.out is not None:
            self.out.write_text(json.dumps(self.report, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="where the JSON goes")
    known = ["llama-2-7b-128k", "llama-3.1-8b", "qwen2.5-7b-1m"]
    parser.add_argument("--shapes", nargs="+", default=known, help="model shapes")
    parser.add_argument("--contexts", nargs="+", type=int, default=[32768, 131072], help="tokens")
    parser.add_argument("--budget", type=int, default=4096, help="tokens in the retrieval cache")
    parser.add_argument("--prefill-tokens", type=int, default=16384, help="length of the prefill comparison")
    parser.add_argument("--vram", type=float, default=24.0, help="GB of device memory to use at most")
    parser.add_argument("--rehearse", action="store_true", help="run on the CPU with a tiny model; no figures")
    return parser.parse_args()


if __name__ == "__main__":
    main()
