"""What a CUDA machine is asked: link, kernels, passes, steps with and without graphs, prefill, peak memory.

Each function measures one thing and returns plain data for JSON. They run on a CPU too, as a rehearsal of the
code; the numbers then mean nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from offload_triforce.bench.subject import Subject
from offload_triforce.config import Settings
from offload_triforce.kernels import ops
from offload_triforce.machine.measure import free_memory, seconds, synchronize
from offload_triforce.scheduler.plan import TilePlan


def kernel_time(
    model: PreTrainedModel, plan: TilePlan, queries: int, slots: int, chunk: int, hbm_gbps: float
) -> dict[str, Any]:
    """Time per tile of the kernels alone: attention, and attention with scoring, selection and gathering.

    A CUDA graph of many tiles is replayed, so that launching from Python does not count. The choice has settled
    before, as it has in decoding: few chunks enter.
    """
    device, heads = model.device, model.config.get_text_config().num_attention_heads
    tiles = max(2, min(32, (1 << 30) // plan.tile_bytes))
    shape = (tiles, 2, plan.kv_heads, plan.tile_tokens, plan.head_dim)
    kv = torch.randn(shape, dtype=model.dtype, device=device)
    query = torch.randn(heads, queries, plan.head_dim, dtype=model.dtype, device=device)
    attention, running, per_tile = ops.RunningAttention(), ops.RunningChoice(), plan.tile_tokens // chunk
    params = ops.AttentionParams(plan.head_dim**-0.5)
    buffer = torch.zeros(2, plan.kv_heads, slots, chunk, plan.head_dim, dtype=model.dtype, device=device)
    choice = ops.ChunkSelection(
        torch.full((plan.kv_heads, slots), float("-inf"), device=device),
        torch.full((plan.kv_heads, slots), -1, dtype=torch.long, device=device),
        torch.zeros(plan.kv_heads, tiles * per_tile + 1, dtype=torch.bool, device=device),
    )

    def attend(refresh: bool) -> None:
        attention.start(query, plan.kv_heads, params)
        attention.update(kv[0, 0], kv[0, 1])
        if refresh:
            running.start(attention.packed, attention.logsumexp(), params.scaling, chunk, choice, buffer)
        for i in range(tiles):
            attention.update(kv[i, 0], kv[i, 1])
            if refresh:
                running.see(i * per_tile, kv[i])
        attention.finish()

    result: dict[str, Any] = {"queries": queries, "tile_bytes": plan.tile_bytes, "tiles": tiles}
    for name, refresh in (("attention", False), ("attention_and_refresh", True)):
        taken = seconds(device, _replayable(device, lambda refresh=refresh: attend(refresh)), 10) / tiles
        result[name] = {
            "us_per_tile": taken * 1e6,
            "gbps": plan.tile_bytes / taken / 1e9,
            "share_of_hbm": plan.tile_bytes / taken / 1e9 / hbm_gbps,
            "hidden_at_25_gbps": taken < plan.tile_bytes / 25e9,
            "hidden_at_55_gbps": taken < plan.tile_bytes / 55e9,
        }
    return result


def _replayable(device: torch.device, work: Callable[[], None]) -> Callable[[], object]:
    """The same work as a CUDA graph; on a CPU, the work itself."""
    work()  # compiles, and lets what settles settle
    if device.type != "cuda":
        return work
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def pass_time(subject: Subject, queries: int, ceiling_gbps: float, repeats: int = 5) -> dict[str, Any]:
    """Passes over the full cache against the time of their bytes at the measured ceiling of the link, GB/s."""
    subject.verify(queries)
    before = subject.device.incoming.moved
    times = [subject.verify(queries) for _ in range(repeats)]
    moved = (subject.device.incoming.moved - before) / repeats
    needed, taken = subject.pass_bytes, statistics.median(times)
    return {
        "queries": queries,
        "pass_bytes": needed,
        "pass_s": taken,
        "pass_s_all": times,
        "gbps": needed / taken / 1e9,
        "share_of_ceiling": needed / taken / 1e9 / ceiling_gbps,
        "pass_over_link": taken / (needed / (ceiling_gbps * 1e9)),
        "bytes_over_needed": moved / needed,
    }


def step_time(subject: Subject, queries: int, repeats: int = 30) -> dict[str, float]:
    """A step of the retrieval level with and without CUDA graphs, ms. On a CPU both are without."""
    result = {}
    for name, graphs in (("graphs_ms", subject.runtime.graphs), ("eager_ms", None)):
        subject.retrieval.graphs = graphs
        for _ in range(5):  # a shape is captured after some uses
            subject.draft(queries)
        result[name] = 1e3 * statistics.median(subject.draft(queries) for _ in range(repeats))
    subject.retrieval.graphs = subject.runtime.graphs
    return result | {"queries": queries}


def prefill_speed(model: PreTrainedModel, settings: Settings, tokens: int) -> dict[str, Any]:
    """Tokens per second of our prefill, and of transformers with sdpa, at once and in chunks: the better one counts."""
    device = model.device
    text = torch.arange(tokens) % 1000
    subject = Subject(model, settings, text)
    try:
        subject.read()  # warms up
        ours = subject.read()
    finally:
        subject.close()
    del subject
    free_memory()

    @torch.no_grad()
    def plain(chunk: int) -> float:
        synchronize(device)
        started = time.perf_counter()
        cache, ids = None, text.to(device)[None]
        for start in range(0, tokens, chunk):
            part = ids[:, start : start + chunk]
            cache = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
        synchronize(device)
        return time.perf_counter() - started

    theirs = {}
    for name, chunk in (("in one piece", tokens), ("in the same chunks", settings.prefill_chunk)):
        plain(chunk)
        theirs[name] = plain(chunk)
        free_memory()
    return {
        "tokens": tokens,
        "chunk": settings.prefill_chunk,
        "tokens_per_s": tokens / ours,
        "transformers_tokens_per_s": {name: tokens / taken for name, taken in theirs.items()},
        "speedup": min(theirs.values()) / ours,
    }


def peak_memory(model: PreTrainedModel, settings: Settings, tokens: int) -> dict[str, Any]:
    """Most device memory in use over prefill, passes and drafting, against what was worked out beforehand."""
    device = model.device
    free_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        weights = torch.cuda.memory_allocated(device)
    else:
        weights = sum(weight.nbytes for weight in model.parameters())
    subject = Subject(model, settings, torch.arange(tokens) % 1000)
    try:
        prefill_s = subject.read()
        for _ in range(4):  # captures the step's graph, too
            subject.draft(settings.width)
        pass_s = subject.verify(settings.block)
        cuda = device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(device) if cuda else 0
        planned = weights + subject.runtime.needs.device
        return {
            "tokens": tokens,
            "peak_bytes": peak,
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(device) if cuda else 0,
            "planned_bytes": planned,
            "peak_over_planned": peak / planned,
            "weights_bytes": weights,
            "planned": subject.runtime.needs.caches | subject.runtime.needs.prefill,
            "prefill_s": prefill_s,
            "prefill_tokens_per_s": tokens / prefill_s,
            "pass_s": pass_s,
        }
    finally:
        subject.close()


def measured_subject(model: PreTrainedModel, settings: Settings, tokens: int) -> Subject:
    """A target over ``tokens`` random keys and values."""
    subject = Subject(model, settings, torch.arange(tokens) % 1000)
    subject.fill()
    return subject
