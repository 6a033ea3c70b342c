"""Is the link ever idle? The time of a pass against the time that its bytes take on the link alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from offload_triforce.bench.shapes import random_model
from offload_triforce.bench.subject import Subject
from offload_triforce.bench.texts import demo_prompt
from offload_triforce.config import Settings
from offload_triforce.engine import TriForce
from offload_triforce.errors import InputError
from offload_triforce.machine.describe import describe_machine
from offload_triforce.model.fetch import fetch_model
from offload_triforce.scheduler.emulated import EmulatedDevice

MODELS = {"smollm2": 8192, "llama-1b": 131_072, "hybrid-1b": 262_144}  # and their positions
# The link dominates when its time is a multiple of the computation's: these many times.
DOMINANCE = (3.0, 6.0, 12.0)


def make_subject(model: str, tokens: int, settings: Settings) -> Subject:
    """A target on the emulated device: SmolLM2 with real text, read for real, or a shape with random weights.

    Raises:
        InputError: no such model, or more tokens than it has positions.
    """
    check(model, tokens)
    device = EmulatedDevice()
    if model == "smollm2":
        engine = TriForce.load(fetch_model("smollm2"), dtype="float32", device="cpu")
        subject = Subject(engine.model, settings, torch.tensor(demo_prompt(engine, tokens)), device)
        subject.read()
    else:
        target = random_model(model, torch.float32, torch.device("cpu"), tokens + 1024)
        subject = Subject(target, settings, torch.arange(tokens) % 1000, device)
        subject.fill()
    return subject


def check(model: str, tokens: int, queries: int = 1, settings: Settings | None = None) -> None:
    """What can be refused before anything is read.

    Args:
        model: of MODELS. tokens: of text. queries: of a pass with these ``settings``.

    Raises:
        InputError: what does not fit, and what would.
    """
    if model not in MODELS:
        raise InputError(f"unknown model {model!r}; known are {', '.join(MODELS)}")
    if tokens > MODELS[model]:
        raise InputError(f"{tokens:,} tokens are more than the {MODELS[model]:,} positions of {model}; take fewer")
    if settings is not None and queries > settings.block:
        raise InputError(f"a pass of {queries:,} queries is larger than passes are, {settings.block:,}; take fewer")


def bench_pipeline(
    models: Sequence[str],
    settings: Settings,
    tokens: int,
    queries: int,
    repeats: int,
    gbps: Sequence[float] | None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time passes over emulated links; one row per model and bandwidth.

    Args:
        models: of MODELS. settings: how to run. tokens: length of the text.
        queries: tokens that a pass reads.
        repeats: passes per row; the median counts.
        gbps: bandwidths in GB/s; None takes DOMINANCE.
        say: told what is going on.

    Returns:
        What was measured, for JSON: ``machine``, and ``results`` with, per row, ``pass_over_link`` (seconds of a pass
        over seconds of its bytes at the bandwidth) and ``bytes_over_needed`` (bytes moved over bytes of all streamed
        tiles; 1 is each byte once).
    """
    for model in models:
        check(model, tokens, queries, settings)
    results = []
    for model in models:
        say(f"{model}: filling {tokens:,} tokens of KV cache")
        subject = make_subject(model, tokens, settings)
        try:
            needed = subject.pass_bytes
            subject.verify(queries)  # the first pass warms up
            compute_s = statistics.median(subject.verify(queries) for _ in range(repeats))
            for speed in gbps or [two_digits(needed / (compute_s * factor) / 1e9) for factor in DOMINANCE]:
                say(f"{model}: passes at {speed:g} GB/s")
                results.append({"model": model, "tokens": tokens, "unthrottled_s": compute_s})
                results[-1] |= _measure(subject, needed, speed, queries, repeats)
        finally:
            subject.close()
    return {"machine": describe_machine(), "settings": vars(settings), "queries": queries, "results": results}


def _measure(subject: Subject, needed: int, gbps: float, queries: int, repeats: int) -> dict[str, Any]:
    device = subject.device
    device.gbps = gbps
    before = device.incoming.moved
    times = [subject.verify(queries) for _ in range(repeats)]
    moved = (device.incoming.moved - before) / repeats
    device.gbps = None
    link_s = needed / (gbps * 1e9)
    return {
        "gbps": gbps,
        "pass_bytes": needed,
        "link_s": link_s,
        "pass_s": statistics.median(times),
        "pass_over_link": statistics.median(times) / link_s,
        "pass_over_link_all": [seconds / link_s for seconds in times],
        "bytes_over_needed": moved / needed,
    }


def two_digits(value: float) -> float:
    """Rounded to two significant digits."""
    return float(f"{value:.2g}")
