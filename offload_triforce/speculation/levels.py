"""Levels 1 and 2: the target's weights over its retrieval cache, and over its full cache."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from offload_triforce.cache.buffer import GrowingBuffer
from offload_triforce.cache.full import FullCache
from offload_triforce.cache.retrieval import Refresh, RetrievalCache
from offload_triforce.cache.static import StaticView
from offload_triforce.cache.window import WindowCache
from offload_triforce.kernels import ops
from offload_triforce.model.adapter import run
from offload_triforce.model.graphs import StepGraphs
from offload_triforce.model.layout import ModelLayout
from offload_triforce.scheduler.pipeline import Leaving
from offload_triforce.speculation.sampling import Sampler
from offload_triforce.speculation.text import TokenText


class TargetCaches:
    """All caches of the target. A model may lack full layers or sliding layers, but not both."""

    def __init__(
        self,
        layout: ModelLayout,
        full: FullCache | None,
        retrieval: RetrievalCache | None,
        window: WindowCache | None,
    ) -> None:
        self.layout, self.full, self.retrieval, self.window = layout, full, retrieval, window
        self.place = {layer: i for group in (layout.full, layout.sliding) for i, layer in enumerate(group)}
        self.length = 0  # committed tokens of the text
        self.drafted = 0  # tokens behind them that the retrieval level has read
        self.pending = 0  # tokens behind them that the target has read

    def fill_layer(self, layer: int, kv: Tensor, queries: Tensor, rule: ops.Rule) -> Leaving | None:
        """Prefill of one layer: ``kv`` [2, K, n, D], newest ``queries`` [H, m, D]. The retrieval cache chooses.

        Returns the copies to the host that still read ``kv``, if there are any.
        """
        index = self.place[layer]
        if rule.window is not None:
            self.window.fill_layer(index, kv)
            return None
        leaving = self.full.fill_layer(index, kv)
        length, tokens = kv.shape[2], queries.shape[1]
        recent, sink = max(self.retrieval.shape.recent, tokens), self.retrieval.shape.sink
        near, attention = kv[:, :, -recent:], ops.RunningAttention()
        attention.start(queries, kv.shape[1], rule)
        attention.update(near[0], near[1], ops.own_tokens(tokens, kv.device))
        if 0 < sink <= length - recent:
            attention.update(kv[0, :, :sink], kv[1, :, :sink])
        refresh = self.retrieval.refresh(index, attention.packed, attention.logsumexp(), rule.scaling, length)
        tile = self.full.stream.plan.tile_tokens
        for start in range(0, length, tile):  # in parts: scoring works in float32
            refresh.see(start, kv[:, :, start : start + tile])
        return leaving

    def end_fill(self, tokens: int) -> None:
        """All layers have been filled with ``tokens`` tokens."""
        for cache in (self.full, self.window):
            if cache is not None:
                cache.end_fill(tokens)
        self.length = tokens
        self._sync(tokens)

    def commit(self, tokens: int) -> None:
        """The target has accepted the first ``tokens`` of its pending tokens."""
        refreshed = self.length
        for cache in (self.full, self.window):
            if cache is not None:
                cache.commit(tokens)
        self.length += tokens
        self.pending = 0
        self._sync(refreshed)

    def small(self, layer: int, rule: ops.Rule) -> tuple[GrowingBuffer, int]:
        """What the retrieval level attends to in a layer of the model: a cache, and the layer's place in it."""
        return self.retrieval if rule.window is None else self.window, self.place[layer]

    def static_view(self, tokens: int) -> StaticView:
        """The same for steps of that many tokens that are captured."""
        caches = [cache for cache in (self.retrieval, self.window) if cache is not None]
        return StaticView(caches, self.small, tokens)

    def rollback_drafted(self) -> None:
        """Drop what the retrieval level has drafted."""
        for cache in (self.retrieval, self.window):
            if cache is not None:
                cache.rollback()
        self.drafted = 0

    def reset(self) -> None:
        """Forget everything."""
        for cache in (self.full, self.retrieval, self.window):
            if cache is not None:
                cache.reset()
        self.length = self.drafted = self.pending = 0

    def _sync(self, refreshed: int) -> None:
        if self.full is not None:
            self.retrieval.sync(self.full.tail.settled, self.full.tiled, self.length, refreshed)


class _TargetLevel:
    """What both levels share: the weights, and a step over the unread end of the text."""

    def __init__(self, model: PreTrainedModel, caches: TargetCaches, sampler: Sampler) -> None:
        self.model, self.caches, self.sampler = model, caches, sampler

    def _step(self, text: TokenText, guesses: int, read: int, grown: Caches) -> tuple[int, Tensor]:
        """Read what follows the first ``read`` tokens: how many that were, and the distributions asked for."""
        tokens = text[read:]
        logits = self._forward(tokens, read, guesses + 1)
        for cache in grown:
            if cache is not None:
                cache.end_step(len(tokens))
        return len(tokens), self.sampler.distributions(logits, text.ids, len(text) - guesses)

    def _forward(self, tokens: Sequence[int], position: int, keep: int) -> Tensor:
        return run(self.model, tokens, position, self, keep=keep)


class RetrievalLevel(_TargetLevel):
    """Level 1: attends to the retrieval cache; in sliding layers, to the same window as the target."""

    def __init__(
        self, model: PreTrainedModel, caches: TargetCaches, sampler: Sampler, graphs: StepGraphs | None = None
    ) -> None:
        super().__init__(model, caches, sampler)
        self.graphs = graphs

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: ops.Rule) -> Tensor:
        """The view that the model attends over."""
        cache, index = self.caches.small(layer, rule)
        return cache.attend(index, query, key, value, rule)

    def score(self, text: TokenText, guesses: int) -> Tensor:
        """Read the unread end of the text: distributions [guesses + 1, V] around the last ``guesses`` tokens."""
        caches = self.caches
        read, p = self._step(text, guesses, caches.length + caches.drafted, (caches.retrieval, caches.window))
        caches.drafted += read
        return p

    def keep(self, length: int) -> None:
        """Forget everything drafted after the first ``length`` tokens of the text."""
        caches = self.caches
        kept = max(0, length - caches.length)
        if kept < caches.drafted:
            keep_pending((caches.retrieval, caches.window), kept)
            caches.drafted = kept

    def _forward(self, tokens: Sequence[int], position: int, keep: int) -> Tensor:
        if self.graphs is None:
            return super()._forward(tokens, position, keep)
        return self.graphs(tokens, position, self, keep)


class FullLevel(_TargetLevel):
    """Level 2: attends to everything, and (with ``refresh``) chooses anew for the retrieval cache on the way."""

    def __init__(self, model: PreTrainedModel, caches: TargetCaches, sampler: Sampler, refresh: bool) -> None:
        super().__init__(model, caches, sampler)
        self.refresh = refresh

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: ops.Rule) -> Tensor:
        """The view that the model attends over."""
        caches, index = self.caches, self.caches.place[layer]
        if rule.window is not None:
            return caches.window.attend(index, query, key, value, rule)

        def observe(packed: Tensor, baseline: Tensor, scaling: float) -> Refresh:
            return caches.retrieval.refresh(index, packed, baseline, scaling, caches.length)

        return caches.full.attend(index, query, key, value, rule, observe if self.refresh else None)

    def score(self, text: TokenText, guesses: int) -> Tensor:
        """One pass: read the unread end of the text against the full cache: distributions [guesses + 1, V]."""
        caches = self.caches
        caches.rollback_drafted()
        if caches.full is not None:
            caches.full.begin_step()
        read, p = self._step(text, guesses, caches.length + caches.pending, (caches.full, caches.window))
        caches.pending += read
        return p

    def keep(self, length: int) -> None:
        """Forget everything read after the first ``length`` tokens of the text."""
        caches = self.caches
        caches.pending = max(0, length - caches.length)
        keep_pending((caches.full, caches.window), caches.pending)

    def settle(self) -> None:
        """Commit what was kept."""
        self.caches.commit(self.caches.pending)


Caches = tuple[FullCache | RetrievalCache | WindowCache | None, ...]


def keep_pending(caches: Caches, tokens: int) -> None:
    """Drop all but the first ``tokens`` pending tokens from each cache that there is."""
    for cache in caches:
        if cache is not None:
            cache.keep_pending(tokens)
