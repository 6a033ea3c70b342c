"""The ways to decode that are compared: three of ours, two of transformers'. Each answers one prompt, greedily."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from offload_triforce.bench.answering import Answering, Case, Read
from offload_triforce.bench.pace import Pace, paced
from offload_triforce.bench.peak import PeakMemory
from offload_triforce.bench.speculation import SHARE, equal_memory
from offload_triforce.config import Settings, replace_settings
from offload_triforce.engine import TriForce
from offload_triforce.model.layout import ModelLayout
from offload_triforce.planner.choose import choose_for_loaded
from offload_triforce.planner.sizes import make_plan, make_shape
from offload_triforce.runtime.runtime import Runtime
from offload_triforce.scheduler.device import Device
from offload_triforce.scheduler.simulate import predict_prefill

OURS = {
    "plain": "ours, plain: one pass over the streamed cache per token",
    "triforce": "ours, the paper's setting: chains of 12, chosen once",
    "best": "ours, the defaults",
}
THEIRS = {
    "transformers-offloaded": "transformers, its offloaded cache",
    "transformers-cpu": "transformers on the CPU: whole cache in memory, no link",
}
WAYS = OURS | THEIRS
BARE = ("plain", "transformers-cpu", "best")  # those that are compared where there is no link


@dataclass(frozen=True)
class Outcome:
    """An answer's tokens, and its figures under the names of the JSON report."""

    tokens: list[int]
    figures: dict[str, Any]


def settings_for(way: str, layout: ModelLayout, capacity: int) -> Settings:
    """How one of OURS is run at caches of that many tokens.

    The paper's setting gets the memory of our defaults for its retrieval cache (a model in 16 bits), or the paper's
    share of the text, 4096 tokens of 128K, where that is more.
    """
    if way == "plain":
        return Settings(gamma=0)
    best = Settings()
    if way == "best":
        return best
    best = replace_settings(best, {"budget": best.budget_for(capacity)})
    equal = equal_memory(Settings.triforce(), best, layout.attention[0].head_dim)
    least = equal.sink + equal.recent + equal.chunk
    return replace_settings(equal, {"budget": max(equal.budget, min(4096, capacity // SHARE), least)})


def settings_here(way: str, engine: TriForce, capacity: int) -> Settings:
    """The same, and what is open in them chosen as the engine does it: on a GPU, the rest of its memory is filled."""
    return choose_for_loaded(engine.model, engine.layout, settings_for(way, engine.layout, capacity), capacity)


def streamed_bytes(engine: TriForce, capacity: int, tokens: int) -> int:
    """Bytes of the KV cache of ``tokens`` tokens that a plain pass has to fetch: whole tiles; the tail is there."""
    settings = settings_here("plain", engine, capacity)
    plan = make_plan(engine.layout, settings, capacity)
    if plan is None:
        return 0
    return plan.streamed_bytes(
        max(0, tokens - make_shape(settings, capacity).tail_needed(settings.news)) // plan.tile_tokens
    )


def answer_ours(
    engine: TriForce,
    way: str,
    case: Case,
    read: Read | None,
    make_device: Callable[[], Device],
    pace: Pace | None = None,
) -> Outcome:
    """One of OURS. Warmed up by a short answer, which on a CPU sees no link.

    ``read``: the prompt as it was read before, instead of a prefill for each way. ``make_device``: with its link.
    ``pace``: at which the answer is computed.

    Raises:
        MemoryLimitError: does not fit.
    """
    settings = settings_here(way, engine, case.capacity)
    with (
        PeakMemory(engine.layout.device) as peak,
        Answering.warm(engine, settings, case, read, make_device()) as answering,
    ):
        with paced(engine.model, pace):
            stream = answering.answer()
        prefill_s = answering.prefill_s
        ttft_s = prefill_s if read is None else _beside_link(read, answering.session.runtime)
    stats = stream.stats
    link_gbps = stats.link_bytes / stats.decode_s / 1e9
    figures = {
        "new_tokens": stats.new_tokens,
        "ms_per_token": stats.ms_per_token,
        "tokens_per_s": 1e3 / stats.ms_per_token,
        "prefill_s": prefill_s,
        "ttft_s": ttft_s + stats.ttft_s,
        "link_gbps": link_gbps,
        "link_bytes_per_token": stats.link_bytes_per_token,
        "passes": stats.passes,
        "tokens_per_pass": stats.tokens_per_pass,
        "acceptance": {"draft": stats.draft.rate, "retrieval": stats.retrieval.rate},
        "budget": settings.budget_for(case.capacity) if settings.gamma else None,
        "resident": settings.resident or 0.0,
        "device_peak_bytes": peak.device,
        "host_peak_bytes": peak.host - (read.size if read else 0),
    }
    return Outcome(list(stream.token_ids), figures)


def _beside_link(read: Read, runtime: Runtime) -> float:
    """Seconds of a prefill, of which each layer's KV leaves over the link beside the next layer's computation.

    The computation was measured once, for all ways; the copies are its bytes at the emulated link's speed.
    """
    layers, gbps = read.reading.layers, runtime.device.gbps
    if gbps is None:
        return read.seconds
    copying = [0.0] * len(layers)
    for index in runtime.layout.full:
        copying[index] = layers[index].kv.nbytes / (gbps * 1e9)
    chunks = -(-len(read.reading.tokens) // runtime.settings.prefill_chunk)
    return predict_prefill([read.seconds / len(layers)] * len(layers), copying, chunks)


class _Stamps(BaseStreamer):
    """Writes down when each token came. transformers hands it over on the host, so the device is through by then."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt = True

    def put(self, value: Tensor) -> None:
        if not self._prompt:
            self.times.append(time.perf_counter())
        self._prompt = False

    def end(self) -> None:
        pass


def answer_theirs(model: PreTrainedModel, case: Case, offloaded: bool) -> Outcome:
    """transformers' own ``generate``, with its own attention.

    Its prefill brings the first token, so what counts as decoding are the tokens after it.

    Args:
        model: on the device that is to compute. case: what is asked.
        offloaded: with the KV cache in host memory (CUDA), moved to the device and back for each token.
    """
    ids = torch.tensor([case.prompt], device=model.device)
    options: dict[str, Any] = {"max_new_tokens": case.new_tokens, "do_sample": False}
    if offloaded:
        options["cache_implementation"] = "offloaded"
    stamps = _Stamps()
    with PeakMemory(model.device) as peak, torch.no_grad():
        started = time.perf_counter()
        output = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=stamps, **options)
    tokens, times = output[0, len(case.prompt) :].tolist(), stamps.times
    later = len(times) - 1
    ms = 1e3 * (times[-1] - times[0]) / later if later else None
    figures = {
        "new_tokens": len(tokens),
        "ms_per_token": ms,
        "tokens_per_s": 1e3 / ms if ms else None,
        "prefill_s": times[0] - started,
        "ttft_s": times[0] - started,
        "passes": len(tokens),
        "tokens_per_pass": 1.0,
        "device_peak_bytes": peak.device,
        "host_peak_bytes": peak.host,
    }
    return Outcome(tokens, figures)
