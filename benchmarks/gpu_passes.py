"""What a CUDA machine is asked of the whole: passes, drafting beside them, steps, graphs, prefill, peak memory.

Each function measures one thing and returns plain data for JSON. They run on a CPU too, as a rehearsal of the
code; the numbers then mean nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from offload_triforce import TriForce
from offload_triforce.bench.subject import Subject
from offload_triforce.config import Settings, replace_settings
from offload_triforce.machine.measure import free_memory, synchronize
from offload_triforce.model.adapter import attached
from offload_triforce.scheduler.device import on
from offload_triforce.speculation.tree import chain

# A pass may take this much longer than its bytes on the link before something else is said to limit it.
SLACK = 1.05


@contextmanager
def measured_subject(model: PreTrainedModel, settings: Settings, tokens: int) -> Iterator[Subject]:
    """A target over ``tokens`` random keys and values."""
    subject = Subject(model, settings, torch.arange(tokens) % 1000)
    try:
        subject.fill()
        yield subject
    finally:
        subject.close()


def pass_time(subject: Subject, queries: int, link_gbps: float, repeats: int = 5) -> dict[str, Any]:
    """Passes over the full cache: their bytes at the link's own speed, when the host is through, when the device is.

    ``limit``: what takes longest of the three: the bytes on the link; the host until ``score`` returns; or the
    computation, which is the pass less what it waited for tiles. "link" also where the pass takes hardly longer.
    """
    passes = [one_pass(subject, queries) for _ in range(repeats + 1)][1:]
    needed = subject.pass_bytes
    taken, host, computing = (statistics.median(each[part] for each in passes) for part in range(3))
    link = needed / (link_gbps * 1e9)
    parts = {"link": link, "host": host, "computation": computing}
    return {
        "queries": queries,
        "pass_bytes": needed,
        "resident": subject.settings.resident,
        "ring": subject.runtime.plan.ring,
        "pass_s": taken,
        "link_s": link,
        "host_s": host,
        "computation_s": computing,
        "pass_over_link": taken / link if link else None,
        "gbps": needed / taken / 1e9,
        "moved_over_needed": passes[0][3] / needed if needed else None,
        "limit": "link" if link and taken <= SLACK * link else max(parts, key=parts.__getitem__),
    }


@torch.no_grad()
def one_pass(subject: Subject, queries: int) -> tuple[float, float, float, int]:
    """Seconds of a pass, until ``score`` returned, and of its computation; and bytes that it moved."""
    moved = subject.device.incoming.moved
    with on(subject.layout.device), attached(subject.model):
        synchronize(subject.layout.device)
        started = time.perf_counter()
        subject.target.score(chain(range(1, queries + 1)))
        issued = time.perf_counter() - started
        synchronize(subject.layout.device)
        taken = time.perf_counter() - started
    waited = subject.target.slack().spare
    subject.target.commit([])
    return taken, issued, max(0.0, taken - waited), subject.device.incoming.moved - moved


@torch.no_grad()
def overlapped(subject: Subject, queries: int, link_gbps: float) -> dict[str, Any]:
    """A pass beside which the retrieval level drafts whenever the computation would wait: is the link kept busy?"""
    width, steps = subject.settings.width + subject.settings.gamma1, 0

    def step() -> None:
        nonlocal steps
        subject.retrieval.score(chain(range(1, width + 1)), [])
        subject.retrieval.keep([])
        steps += 1

    alone = statistics.median(one_pass(subject, queries)[0] for _ in range(3))
    for _ in range(4):  # captures the step's graph
        subject.draft(width)
    taken = []
    with on(subject.layout.device), attached(subject.model):
        for _ in range(3):
            synchronize(subject.layout.device)
            steps, started = 0, time.perf_counter()
            subject.target.score(chain(range(1, queries + 1)), step)
            synchronize(subject.layout.device)
            taken.append(time.perf_counter() - started)
            subject.target.commit([])
    link, whole = subject.pass_bytes / (link_gbps * 1e9), statistics.median(taken)
    return {
        "queries": queries,
        "pass_alone_s": alone,
        "pass_with_drafting_s": whole,
        "steps": steps,
        "link_used_alone": link / alone,
        "link_used_with_drafting": link / whole,
    }


def step_time(subject: Subject, repeats: int = 20) -> dict[str, Any]:
    """Forward steps of the retrieval level, ms: as a CUDA graph and without, and the first ones, which capture it."""
    width = subject.settings.width + subject.settings.gamma1
    first = [1e3 * subject.draft(width) for _ in range(4)]
    found: dict[str, Any] = {"tokens": width, "first_ms": first, "graphs": subject.runtime.graphs is not None}
    for name, graphs in (("replayed_ms", subject.runtime.graphs), ("launched_ms", None)):
        subject.retrieval.graphs = graphs
        found[name] = 1e3 * statistics.median(subject.draft(width) for _ in range(repeats))
    subject.retrieval.graphs = subject.runtime.graphs
    found["capture_s"] = max(0.0, first[1] - found["launched_ms"]) / 1e3 if found["graphs"] else None
    return found


def whole_step(model: PreTrainedModel, settings: Settings, tokens: int, new_tokens: int = 24) -> dict[str, Any]:
    """A whole step of level 1 as answers make it: forward, candidates by the sampler, and all Python around them, ms.

    Trees of a fixed size, drafted before each pass and not beside it; greedy, and drawn at a temperature.
    """
    fixed = {"adaptive": False, "overlap": False, "gamma": 8, "draft_tokens": 32, "context": None}
    found: dict[str, Any] = {}
    for name, sampling in (("greedy", {"do_sample": False}), ("drawn", {"do_sample": True, "temperature": 0.6})):
        with TriForce(model, None, "ngram", settings=replace_settings(settings, fixed)) as engine:
            prompt = torch.arange(tokens)[None] % 1000
            for _ in range(2):  # the first captures the graphs
                options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "seed": 0} | sampling
                stats = engine.generate(prompt, **options).stats
            found[name] = {
                "step_ms": 1e3 * stats.draft_s / max(1, stats.steps),
                "steps": stats.steps,
                "tokens_per_step": stats.step_tokens / max(1, stats.steps),
                "passes": stats.passes,
                "ms_per_token": stats.ms_per_token,
            }
        free_memory()
    return found


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
            "planned": vars(subject.runtime.needs),
            "prefill_s": prefill_s,
            "prefill_tokens_per_s": tokens / prefill_s,
            "pass_s": pass_s,
        }
    finally:
        subject.close()
