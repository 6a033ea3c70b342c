"""What the caches and the prefill take, worked out before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from offload_triforce.cache.sizes import RetrievalShape, tail_capacity, window_room
from offload_triforce.config import Settings
from offload_triforce.errors import MemoryLimitError
from offload_triforce.host_memory import free_on_host
from offload_triforce.model.outline import ModelLayout
from offload_triforce.scheduler.plan import TilePlan

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Configured(Protocol):
    """A model, loaded or only planned."""

    @property
    def config(self) -> PretrainedConfig:
        """transformers' own."""


@dataclass(frozen=True)
class Needs:
    """Bytes beside the weights: in host memory, and on the device by purpose."""

    host: int
    caches: dict[str, int]  # held all along
    prefill: dict[str, int]  # held while the prompt is read; decoding takes less

    @property
    def device(self) -> int:
        """Most bytes on the device at one time."""
        return sum(self.caches.values()) + sum(self.prefill.values())

    @property
    def fixed(self) -> int:
        """Of these, those that hardly depend on the length of the text."""
        everything = self.caches | self.prefill
        return sum(everything.get(part, 0) for part in ("ring", "tail", "retrieval cache", "activations of a chunk"))


def work_out(
    model: Configured,
    layout: ModelLayout,
    settings: Settings,
    shape: RetrievalShape,
    plan: TilePlan | None,
    context: int,
) -> Needs:
    """What a text of ``context`` tokens takes. ``plan`` is None when all layers have a sliding window."""
    config, itemsize, block = model.config.get_text_config(), layout.dtype.itemsize, settings.block
    caches, host = {}, 0
    if layout.sliding:
        room = window_room([layout.layers[i].window for i in layout.sliding], context, block) + settings.drafts
        caches["sliding windows"] = room * sum(layout.token_bytes(i) for i in layout.sliding)
    if plan is not None:
        token = plan.token_bytes * plan.layers
        caches["resident tiles"] = plan.resident_bytes
        caches["ring"] = plan.ring_bytes
        keep = shape.tail_needed(settings.news)
        caches["tail"] = tail_capacity(plan, keep, block, settings.news) * token
        near = shape.near(settings.news, settings.drafts)
        chosen = plan.layers * plan.kv_heads * shape.chosen_bytes(plan.head_dim, itemsize)
        caches["retrieval cache"] = chosen + near * token
        # Which chunks are chosen: one byte per chunk, one int64 and one float32 per slot.
        caches["choice"] = plan.layers * plan.kv_heads * (context // shape.chunk + 12 * shape.slots)
        host = plan.host_bytes
    chunk = min(settings.prefill_chunk, context)
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    prefill = {
        "keys and values of one layer": context * max(layout.token_bytes(i) for i in range(len(layout.layers))),
        "hidden states": context * config.hidden_size * itemsize,
        "rotary embeddings": context * 2 * max(layer.head_dim for layer in layout.layers) * itemsize,
        # Gate, up and their product; queries, keys, values, residuals and norms in float32.
        "activations of a chunk": chunk * (3 * inner + 8 * config.hidden_size) * itemsize,
    }
    return Needs(host, caches, prefill)


def check_memory(needs: Needs, device: torch.device, context: int) -> None:
    """Refuse what cannot fit.

    Raises:
        MemoryLimitError: how much is missing, and a context that would fit.
    """
    free = free_on_host()
    if device.type == "cuda":
        _compare("device", needs.device, needs.fixed, free_on(device), context)
        _compare("host", needs.host, 0, free, context)
    else:
        _compare("host", needs.host + needs.device, needs.fixed, free, context)


def free_on(device: torch.device) -> int:
    """Bytes that this process may still take: what the driver has, and what torch keeps cached without using it."""
    reserved = torch.cuda.memory_reserved(device)
    free = torch.cuda.mem_get_info(device)[0]
    share = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # not in all versions of torch
    if share is not None:
        free = min(free, int(share(device) * torch.cuda.get_device_properties(device).total_memory) - reserved)
    return free + reserved - torch.cuda.memory_allocated(device)


def _compare(kind: str, needed: int, fixed: int, free: int, context: int) -> None:
    if needed <= free:
        return
    fits = max(0, int(context * (free - fixed) / (needed - fixed) * 0.95) // 1024 * 1024)
    hint = f"a context of {fits:,} tokens would fit" if fits else "free some memory or take a smaller model"
    raise MemoryLimitError(
        f"a context of {context:,} tokens needs {needed / 1e9:.1f} GB of {kind} memory, but {free / 1e9:.1f} GB are "
        f"free, {(needed - free) / 1e9:.1f} GB too little; {hint}"
    )
