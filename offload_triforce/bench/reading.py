"""A text that was read once: what its prefill computed, to fill any number of caches with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from offload_triforce.kernels import ops
from offload_triforce.model.adapter import attached
from offload_triforce.model.layout import ModelLayout
from offload_triforce.model.prefill import Progress, prefill
from offload_triforce.runtime import PREFILL_QUERIES, Runtime, on
from offload_triforce.speculation.levels import FullLevel
from offload_triforce.speculation.tree import Node


@dataclass(frozen=True)
class Reading:
    """``tokens`` (n,), and for each layer its keys and values [2, K, n, D], newest queries [H, m, D] and parameters."""

    tokens: Tensor
    layers: list[tuple[Tensor, Tensor, ops.AttentionParams]]

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        layout: ModelLayout,
        tokens: Sequence[int],
        chunk: int = 1024,
        progress: Progress | None = None,
    ) -> Reading:
        """Read a text; its KV stays in host memory."""
        ids, layers = torch.as_tensor(tokens, dtype=torch.long), []

        def keep(index: int, kv: Tensor, queries: Tensor, params: ops.AttentionParams) -> None:
            layers.append((kv.to("cpu", copy=True), queries.clone(), params))

        with on(layout.device), attached(model), torch.no_grad():
            prefill(model, layout, ids, chunk, PREFILL_QUERIES, keep, progress)
        return cls(ids, layers)

    @torch.no_grad()
    def fill(self, runtime: Runtime, rest: Sequence[int] = ()) -> None:
        """Fill a runtime's caches with this text and what follows it, which is read in passes."""
        caches, device = runtime.caches, runtime.layout.device
        caches.reset()
        for index, (kv, queries, params) in enumerate(self.layers):
            leaving = caches.fill_layer(index, kv.to(device), queries, params)
            if leaving:
                leaving.wait()
        caches.end_fill(len(self.tokens))
        choosing = "never" if runtime.settings.gamma == 0 else "each pass"
        target, step = FullLevel(runtime.model, caches, choosing), runtime.settings.news
        with on(device), attached(runtime.model):
            for start in range(0, len(rest), step):
                nodes = chain(rest[start : start + step])
                target.score(nodes)
                target.commit(range(len(nodes)))


def chain(tokens: Sequence[int]) -> list[Node]:
    """Tokens as nodes, each following the one before."""
    nodes: list[Node] = []
    for token in tokens:
        nodes.append(Node(token, nodes[-1] if nodes else None))
    return nodes
