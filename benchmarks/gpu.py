"""The first minutes on a CUDA machine: everything that it has to say, as a table and as JSON.

    python -m benchmarks.gpu --out benchmarks/results/gpu_NAME.json
    python -m benchmarks.gpu --part link --part kernels

Models have well-known shapes and random weights, keys and values are random: for speed, their values do not matter.
The process is kept to --vram GB of device memory, so that a large card stands in for a small one. What does not fit
into the host's memory is skipped, with the reason, and so are parts for which --minutes leave no time. The table goes
to standard output, and after it the JSON, in one line; with --out the JSON is written anew after every part too, so
nothing is lost when a later one fails. ``--rehearse`` runs all of it on a CPU with a tiny model, to test the program;
its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

# Kernels are compiled, whatever earlier runs have left: how long that takes is among what is measured.
os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="triton"))

import torch
from transformers import PreTrainedModel

from benchmarks import gpu_kernels, gpu_link, gpu_passes
from benchmarks.gpu_table import table
from offload_triforce.bench import shapes
from offload_triforce.bench.subject import QUERIES
from offload_triforce.config import Settings, replace_settings
from offload_triforce.errors import MemoryLimitError
from offload_triforce.machine.describe import describe_machine
from offload_triforce.machine.measure import free_memory, memory_bandwidth
from offload_triforce.machine.memory import free_on_host
from offload_triforce.model.layout import probe
from offload_triforce.planner.choose import choose_for_loaded
from offload_triforce.planner.sizes import make_plan, make_shape, work_out

PARTS = ("machine", "link", "kernels", "passes", "overlap", "step", "memory", "prefill")
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 1000}
# Of a rehearsal: tiles of 64 tokens, some resident, and an emulated link that a pass has to wait for.
REHEARSAL = {"budget": 128, "tile": 32, "ring": 4, "resident": 0.25, "gamma": 4, "link_gbps": 0.002}


class Setting:
    """A model of a shape, and the planner's settings for a text of ``context`` tokens."""

    def __init__(self, model: PreTrainedModel, shape: str, context: int, options: argparse.Namespace) -> None:
        self.model, self.device, self.layout = model, model.device, probe(model)
        self.context, self.where = context, f"{shape}, {context:,} tokens"
        settings = Settings(**REHEARSAL) if options.rehearse else Settings()
        if not options.rehearse and options.budget is not None:
            settings = replace_settings(settings, {"budget": options.budget})
        self.settings = choose_for_loaded(model, self.layout, settings, context + 4 * settings.block)
        self.plan, self.held = make_plan(self.layout, self.settings, context), make_shape(self.settings, context)

    @cached_property
    def link_gbps(self) -> float:
        """Of tiles to the device; an emulated link's is what it was asked to be."""
        if self.settings.link_gbps is not None:
            return self.settings.link_gbps
        return gpu_link.link(self.device, self.plan.tile_bytes, 1 << 29)["h2d_gbps"]

    def lacking(self) -> str | None:
        """Why passes over this text are not measured here, if they are not."""
        needed = work_out(self.model, self.layout, self.settings, self.held, self.plan, self.context).host_bytes
        free = free_on_host()
        return (
            f"{needed / 1e9:.1f} GB of host memory needed, {free / 1e9:.1f} GB free" if needed > 0.95 * free else None
        )


def main() -> None:
    options = parse()
    if options.rehearse:
        shapes.SHAPES["tiny"] = (shapes.LlamaConfig, TINY)
        options.shapes, options.contexts, options.prefill_tokens, options.step_tokens = ["tiny"], [384], 256, 300
        torch.set_num_threads(1)  # the emulated link's threads need the other cores
    elif not torch.cuda.is_available():
        sys.exit("error: no CUDA device; --rehearse runs the program on a CPU")
    device = torch.device("cpu" if options.rehearse else "cuda")
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.vram * 1e9 / total))
    run = Run(options)
    run.part("machine", "this machine", machine, device, options)
    for shape in options.shapes:
        measure_model(shape, device, run)
    run.close()


def measure_model(shape: str, device: torch.device, run: Run) -> None:
    """All parts for one model; each that fails is written down as failed, and the next goes on."""
    options = run.options
    dtype = torch.float32 if options.rehearse else torch.bfloat16
    model = shapes.random_model(shape, dtype, device, max(options.contexts) + 1024)
    for context in options.contexts:
        setting = Setting(model, shape, context, options)
        measure_context(setting, run, first=context == options.contexts[0])
    setting = Setting(model, shape, min(options.contexts), options)
    where = f"{shape}, {options.prefill_tokens:,} tokens"
    run.part("prefill", where, gpu_passes.prefill_speed, model, setting.settings, options.prefill_tokens)


def measure_context(setting: Setting, run: Run, first: bool) -> None:
    """What depends on the length of the text; and, at the ``first`` one, what does not."""
    where = setting.where
    if first:
        size = 1 << 22 if run.options.rehearse else 1 << 30
        run.part("link", where, gpu_link.link, setting.device, setting.plan.tile_bytes, size)
        run.part("kernels", where, kernels, setting)
        run.part("step", where, step, setting, run.options.step_tokens)
    lacking = setting.lacking()
    for name, work in (("passes", passes), ("overlap", overlap), ("memory", memory)):
        if lacking is None:
            run.part(name, where, work, setting)
        else:
            run.skip(name, where, lacking)


def machine(device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    described = describe_machine()
    name = described["gpu"]["name"] if "gpu" in described else described["cpu"]
    gbps = memory_bandwidth(device, 1 << 24 if options.rehearse else 1 << 30)  # wakes the card, before it is asked
    return {"device": name, "memory_gbps": gbps, "card": gpu_link.card_says(), "described": described}


def kernels(setting: Setting) -> dict[str, Any]:
    heads = setting.model.config.get_text_config().num_attention_heads
    held, layout = setting.held, setting.layout
    bench = gpu_kernels.Bench(setting.device, layout.dtype, heads, setting.plan, held.slots, held.chunk)
    rows = gpu_kernels.kernels(bench, setting.link_gbps)
    return {"tile_bytes": setting.plan.tile_bytes, "link_gbps": setting.link_gbps, "rows": rows}


def passes(setting: Setting) -> dict[str, Any]:
    with gpu_passes.measured_subject(setting.model, setting.settings, setting.context) as subject:
        sizes = (1, QUERIES, setting.settings.block)
        return {"rows": [gpu_passes.pass_time(subject, queries, setting.link_gbps) for queries in sizes]}


def overlap(setting: Setting) -> dict[str, Any]:
    with gpu_passes.measured_subject(setting.model, setting.settings, setting.context) as subject:
        return gpu_passes.overlapped(subject, setting.settings.block, setting.link_gbps)


def step(setting: Setting, tokens: int) -> dict[str, Any]:
    with gpu_passes.measured_subject(setting.model, setting.settings, setting.context) as subject:
        found = gpu_passes.step_time(subject)
    free_memory()
    return found | {"whole": gpu_passes.whole_step(setting.model, setting.settings, tokens)}


def memory(setting: Setting) -> dict[str, Any]:
    return gpu_passes.peak_memory(setting.model, setting.settings, setting.context)


class Run:
    """Runs parts one by one, and writes the report after each."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.started, self.failed = options, time.perf_counter(), False
        self.report: dict[str, Any] = {"vram_cap_gb": options.vram, "rehearsal": options.rehearse, "parts": {}}

    def part(self, name: str, where: str, work: Callable[..., dict[str, Any]], *args: Any) -> None:
        """One part at one place, if it was asked for and there is time yet."""
        if name not in self.options.part:
            return
        started = time.perf_counter()
        if started - self.started > 60 * self.options.minutes:
            self.skip(name, where, f"{self.options.minutes:g} minutes are over; --part {name} runs it alone")
            return
        try:
            result = work(*args)
        except MemoryLimitError as error:
            result = {"skipped": str(error)}
        except Exception as error:
            traceback.print_exc()
            self.failed, result = True, {"error": f"{type(error).__name__}: {error}"}
        free_memory()
        self._keep(name, where, result | {"took_s": time.perf_counter() - started})

    def skip(self, name: str, where: str, reason: str) -> None:
        if name in self.options.part:
            self._keep(name, where, {"skipped": reason})

    def _keep(self, name: str, where: str, result: dict[str, Any]) -> None:
        self.report["parts"].setdefault(name, {})[where] = result
        print(f"{name}, {where}: {result.get('took_s', 0):.1f} s", file=sys.stderr, flush=True)
        if self.options.out is not None and not self.options.rehearse:
            self.options.out.write_text(json.dumps(self.report, indent=1) + "\n")

    def close(self) -> None:
        self.report["took_s"] = time.perf_counter() - self.started
        print(table(self.report))
        print(json.dumps(self.report))
        if self.failed:
            sys.exit("error: a part failed; standard error has its traceback")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="only this one; may be repeated")
    parser.add_argument("--out", type=Path, help="where the JSON goes, beside standard output")
    parser.add_argument("--shapes", nargs="+", default=["llama-3.1-8b"], help="model shapes")
    parser.add_argument("--contexts", nargs="+", type=int, default=[32768, 131072], help="tokens")
    parser.add_argument("--budget", type=int, help="tokens in the retrieval cache; by default the planner's")
    parser.add_argument("--prefill-tokens", type=int, default=16384, help="length of the prefill comparison")
    parser.add_argument("--step-tokens", type=int, default=4096, help="length of the text of whole steps")
    parser.add_argument("--vram", type=float, default=24.0, help="GB of device memory to use at most")
    parser.add_argument("--minutes", type=float, default=9.0, help="no part begins after that")
    parser.add_argument("--rehearse", action="store_true", help="run on the CPU with a tiny model; no figures")
    options = parser.parse_args()
    options.part = options.part or list(PARTS)
    return options


if __name__ == "__main__":
    main()
