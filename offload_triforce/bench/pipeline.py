"""Is the link ever idle? The time of a pass against the time that its bytes take on the link alone."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from offload_triforce.bench.shapes import random_model
from offload_triforce.bench.subject import Subject
from offload_triforce.bench.texts import demo_prompt
from offload_triforce.config import Settings, replace_settings
from offload_triforce.engine import TriForce
from offload_triforce.errors import InputError
from offload_triforce.machine.describe import describe_machine
from offload_triforce.model.fetch import fetch_model
from offload_triforce.scheduler.emulated import EmulatedDevice

MODELS = {"smollm2": 8192, "llama-1b": 131_072, "hybrid-1b": 262_144}  # and their positions
# In these, computation is all that a CPU is good at; in bf16, tiles are coded.
DTYPES = ("float32", "bfloat16")
# The link dominates when its time is a multiple of the computation's: these many times.
DOMINANCE = (3.0, 6.0, 12.0)


def make_subject(model: str, tokens: int, settings: Settings, dtype: str = "float32") -> Subject:
    """A target on the emulated device: SmolLM2 with real text, read for real, or a shape with random weights.

    Its link is emulated however fast it is, so "auto" codes what can be coded.

    Raises:
        InputError: no such model, or more tokens than it has positions.
    """
    check(model, tokens)
    device = EmulatedDevice()
    if settings.wire == "auto":
        settings = replace_settings(settings, {"wire": "raw" if dtype == "float32" else "coded"})
    if model == "smollm2":
        engine = TriForce.load(fetch_model("smollm2"), dtype=dtype, device="cpu")
        subject = Subject(engine.model, settings, torch.tensor(demo_prompt(engine, tokens)), device)
        subject.read()
    else:
        target = random_model(model, getattr(torch, dtype), torch.device("cpu"), tokens + 1024)
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
    dtypes: Sequence[str] = DTYPES,
) -> dict[str, Any]:
    """Time passes over emulated links; one row per model, dtype and bandwidth.

    Args:
        models: of MODELS. settings: how to run. tokens: length of the text.
        queries: tokens that a pass reads.
        repeats: passes per row; the median counts.
        gbps: bandwidths in GB/s; None takes DOMINANCE.
        say: told what is going on.
        dtypes: of DTYPES.

    Returns:
        What was measured, for JSON: ``machine``, and ``results`` with, per row, ``pass_over_link`` (seconds of a pass
        over seconds of its wire bytes at the bandwidth), ``bytes_over_needed`` (bytes moved over wire bytes of all
        streamed tiles; 1 is each byte once) and ``wire_ratio`` (raw bytes over wire bytes; 1 is not coded).
    """
    for model in models:
        check(model, tokens, queries, settings)
    results = []
    for model, dtype in itertools.product(models, dtypes):
        say(f"{model}, {dtype}: filling {tokens:,} tokens of KV cache")
        subject = make_subject(model, tokens, settings, dtype)
        try:
            needed, raw = subject.pass_bytes, subject.raw_pass_bytes
            subject.verify(queries)  # the first pass warms up
            compute_s = statistics.median(subject.verify(queries) for _ in range(repeats))
            for speed in gbps or [two_digits(needed / (compute_s * factor) / 1e9) for factor in DOMINANCE]:
                say(f"{model}, {dtype}: passes at {speed:g} GB/s")
                results.append({"model": model, "dtype": dtype, "tokens": tokens, "unthrottled_s": compute_s})
                results[-1] |= {"raw_pass_bytes": raw, "wire_ratio": raw / needed if needed else 1.0}
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
