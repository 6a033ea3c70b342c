"""A target with a filled full cache, on which single passes can be timed."""

from __future__ import annotations

import time
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from offload_triforce.config import Settings
from offload_triforce.kernels.ops import Rule
from offload_triforce.model.adapter import attached
from offload_triforce.model.layout import probe
from offload_triforce.runtime import PREFILL_QUERIES, Runtime, on
from offload_triforce.scheduler.device import Device
from offload_triforce.speculation.levels import FullLevel, RetrievalLevel
from offload_triforce.speculation.text import TokenText


def synchronize(device: torch.device) -> None:
    """Wait until the device is through, so that a clock means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Subject:
    """The caches hold a text; each ``verify`` is one pass over it, and leaves everything as it was."""

    def __init__(self, model: PreTrainedModel, settings: Settings, text: Tensor, device: Device | None = None) -> None:
        """``text`` (n,) token ids. ``device`` instead of the model's own, as in ``Runtime``."""
        self.model, self.settings = model, settings
        self.layout = probe(model)
        room = 4 * (settings.gamma + 1)
        self.runtime = Runtime(model, self.layout, settings, len(text) + room, device=device)
        self.device = self.runtime.device
        raw = SimpleNamespace(distributions=lambda rows, ids, length: rows)  # no sampling: the pass alone
        self.target = FullLevel(model, self.runtime.caches, raw, refresh=True)
        self.middle = RetrievalLevel(model, self.runtime.caches, raw, self.runtime.graphs)
        self.text = TokenText(text, len(text) + room)

    def read(self) -> float:
        """Prefill all of the text but its last token, for real; returns seconds."""
        if self.runtime.caches.full is not None:
            self.runtime.caches.full.stream.store.wait_pinned()  # a machine's own pace, and not what is timed
        started = time.perf_counter()
        with on(self.layout.device), attached(self.model), torch.no_grad():
            self.runtime.prefill(self.text.ids[:-1], None)
        synchronize(self.layout.device)
        return time.perf_counter() - started

    @torch.no_grad()
    def fill(self, seed: int = 0) -> None:
        """Fill the caches with random keys and values instead of computing them."""
        caches, length = self.runtime.caches, len(self.text) - 1
        where = {"dtype": self.layout.dtype, "device": self.layout.device}
        chance = torch.Generator(self.layout.device).manual_seed(seed)
        caches.reset()
        config = self.model.config.get_text_config()
        for index, layer in enumerate(self.layout.layers):
            kv = torch.randn(2, layer.kv_heads, length, layer.head_dim, generator=chance, **where)
            queries = torch.randn(
                config.num_attention_heads, PREFILL_QUERIES, layer.head_dim, generator=chance, **where
            )
            leaving = caches.fill_layer(index, kv, queries, Rule(layer.head_dim**-0.5, layer.window))
            if leaving:
                leaving.wait()
        caches.end_fill(length)
        synchronize(self.layout.device)

    def verify(self) -> float:
        """One pass over the full cache with gamma guesses, none of which is kept; returns seconds."""
        return self._score(self.target, self.settings.gamma)

    def draft(self) -> float:
        """One step of the retrieval level with gamma1 guesses, none of which is kept; returns seconds."""
        return self._score(self.middle, self.settings.gamma1)

    def _score(self, level: FullLevel | RetrievalLevel, guesses: int) -> float:
        self.text.append([(7 * i) % 1000 for i in range(guesses)])
        with on(self.layout.device), attached(self.model), torch.no_grad():
            synchronize(self.layout.device)
            started = time.perf_counter()
            level.score(self.text, guesses)
            synchronize(self.layout.device)
            seconds = time.perf_counter() - started
        self.text.truncate(len(self.text) - guesses)
        level.keep(len(self.text) - 1)
        return seconds

    @property
    def pass_bytes(self) -> int:
        """Bytes that a pass has to fetch: the KV of all tokens in whole tiles, less what is resident."""
        full = self.runtime.caches.full
        plan = full.stream.plan
        everything = full.tiled * sum(self.layout.token_bytes(layer) for layer in self.layout.full)
        resident = sum(1 for layer, tile in plan.resident_tiles() if tile < full.tiles)
        return everything - resident * plan.tile_bytes

    def close(self) -> None:
        """Stop the copies and give the caches back."""
        self.runtime.close()
