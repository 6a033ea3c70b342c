"""A target with a filled full cache, on which single passes can be timed."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from offload_triforce.config import Settings
from offload_triforce.kernels.ops import AttentionParams
from offload_triforce.machine.measure import synchronize
from offload_triforce.model.adapter import attached
from offload_triforce.model.layer_view import AttentionPart, LayerPart, RecurrentPart
from offload_triforce.model.layout import probe
from offload_triforce.model.outline import LayerShape, RecurrentShape
from offload_triforce.runtime.levels import RetrievalLevel
from offload_triforce.runtime.runtime import PREFILL_QUERIES, Runtime, choosing
from offload_triforce.runtime.session import Session
from offload_triforce.scheduler.device import Device, on
from offload_triforce.speculation.tree import Node, chain

# Queries of a pass that is timed: TriForce's 12 draft tokens, and the text's last token.
QUERIES = 13


class Subject:
    """The caches hold a text but for its last token; each ``verify`` is one pass over it, and leaves all as it was."""

    def __init__(self, model: PreTrainedModel, settings: Settings, text: Tensor, device: Device | None = None) -> None:
        """``text`` (n,) token ids. ``device`` instead of the model's own, as in ``Runtime``."""
        self.model, self.settings, self.text = model, settings, text
        self.layout = probe(model)
        self.runtime = Runtime(model, self.layout, settings, len(text) + 4 * settings.block, device=device)
        self.device = self.runtime.device
        self.target = self.runtime.target(choosing(settings))
        self.retrieval = RetrievalLevel(model, self.runtime.caches, self.runtime.graphs)

    def read(self) -> float:
        """Prefill all of the text but its last token, for real; returns seconds."""
        if self.runtime.caches.full is not None:
            self.runtime.caches.full.stream.store.wait_pinned()  # a machine's own pace, and not what is timed
        started = time.perf_counter()
        with on(self.layout.device), attached(self.model), torch.no_grad():
            Session(self.runtime).begin(self.text[:-1])
        synchronize(self.layout.device)
        return time.perf_counter() - started

    @torch.no_grad()
    def fill(self, seed: int = 0) -> None:
        """Fill the caches with random keys and values instead of computing them."""
        length = len(self.text) - 1
        where = {"dtype": self.layout.dtype, "device": self.layout.device}
        chance = torch.Generator(self.layout.device).manual_seed(seed)
        heads = self.model.config.get_text_config().num_attention_heads

        def made_up(layer: LayerShape | RecurrentShape) -> LayerPart:
            if isinstance(layer, RecurrentShape):
                size = layer.value_heads, layer.key_dim, layer.value_dim
                state = torch.randn(size, generator=chance, device=where["device"])
                return RecurrentPart(state, torch.randn(layer.taps - 1, layer.channels, generator=chance, **where))
            kv = torch.randn(2, layer.kv_heads, length, layer.head_dim, generator=chance, **where)
            queries = torch.randn(heads, PREFILL_QUERIES, layer.head_dim, generator=chance, **where)
            return AttentionPart(kv, queries, AttentionParams(layer.head_dim**-0.5, layer.window))

        Session(self.runtime).begin_with(length, map(made_up, self.layout.layers))
        synchronize(self.layout.device)

    def verify(self, queries: int = QUERIES) -> float:
        """One pass of so many queries over the full cache, none of which is kept; returns seconds."""
        seconds = self._timed(lambda nodes: self.target.score(nodes), queries)
        self.target.commit([])
        return seconds

    def draft(self, queries: int = QUERIES) -> float:
        """One step of the retrieval level with so many queries, none of which is kept; returns seconds."""
        seconds = self._timed(lambda nodes: self.retrieval.score(nodes, []), queries)
        self.retrieval.keep([])
        return seconds

    def _timed(self, work: Callable[[list[Node]], object], queries: int) -> float:
        nodes = chain([(7 * i) % 1000 for i in range(queries)])
        with on(self.layout.device), attached(self.model), torch.no_grad():
            synchronize(self.layout.device)
            started = time.perf_counter()
            work(nodes)
            synchronize(self.layout.device)
            return time.perf_counter() - started

    @property
    def pass_bytes(self) -> int:
        """Wire bytes that a pass has to fetch: the KV of all tokens in whole tiles, less what is resident."""
        full = self.runtime.caches.full
        store = full.stream.store
        return sum(store.source(*key).nbytes for key in store.stream_order(full.tiles))

    @property
    def raw_pass_bytes(self) -> int:
        """The same before coding."""
        full = self.runtime.caches.full
        return sum(1 for _ in full.stream.store.stream_order(full.tiles)) * full.stream.plan.tile_bytes

    def close(self) -> None:
        """Stop the copies and give the caches back."""
        self.runtime.close()
