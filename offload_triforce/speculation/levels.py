"""Levels 1 and 2: the target's weights over its retrieval cache, and over its full cache."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from offload_triforce.cache.buffer import GrowingBuffer, TreeStep
from offload_triforce.cache.full import FullCache
from offload_triforce.cache.retrieval import Refresh, RetrievalCache
from offload_triforce.cache.static import Held, StaticView
from offload_triforce.cache.window import WindowCache
from offload_triforce.kernels import ops
from offload_triforce.model.adapter import run
from offload_triforce.model.graphs import StepGraphs
from offload_triforce.model.layout import ModelLayout
from offload_triforce.scheduler.device import to_device
from offload_triforce.scheduler.pipeline import Leaving, Slack
from offload_triforce.speculation.tree import Node, sight, tokens_of

# When chunks are chosen for the retrieval cache: anew in each pass, once after the prefill, or not in passes at all.
Choosing = Literal["each pass", "once", "never"]


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
        self.windows = [layer.window for layer in layout.layers if layer.window is not None]
        self.length = 0  # committed tokens of the text

    def fill_layer(self, layer: int, kv: Tensor, queries: Tensor, params: ops.AttentionParams) -> Leaving | None:
        """Prefill of one layer: ``kv`` [2, K, n, D], newest ``queries`` [H, m, D]. The retrieval cache chooses.

        Returns the copies to the host that still read ``kv``, if there are any.
        """
        index = self.place[layer]
        if params.window is not None:
            self.window.fill_layer(index, kv)
            return None
        self.retrieval.store.calibrate(index, kv[0])
        leaving = self.full.fill_layer(index, kv)
        length, tokens = kv.shape[2], queries.shape[1]
        recent, sink = max(self.retrieval.shape.recent, tokens), self.retrieval.shape.sink
        near, attention = kv[:, :, -recent:], ops.RunningAttention()
        attention.start(queries, kv.shape[1], params)
        attention.update(near[0], near[1], ops.own_tokens(tokens, kv.device))
        if 0 < sink <= length - recent:
            attention.update(kv[0, :, :sink], kv[1, :, :sink])
        refresh = self.retrieval.refresh(index, attention.packed, attention.logsumexp(), params.scaling, length)
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

    def commit(self, kept: Sequence[int]) -> None:
        """The target accepts these of its pending tokens (their numbers, ascending). What is drafted stays."""
        refreshed = self.length
        for cache in (self.full, self.window):
            if cache is not None:
                cache.select_pending(kept)
                cache.commit(len(kept))
        self.length += len(kept)
        self._sync(refreshed)

    def drafts(self) -> list[GrowingBuffer]:
        """Where the retrieval level's guesses are pending."""
        window = None if self.window is None else self.window.drafts
        return [buffer for buffer in (self.retrieval, window) if buffer is not None]

    def keep_drafts(self, kept: Sequence[int]) -> None:
        """Keep these of the retrieval level's guesses (their numbers, ascending), and drop the others."""
        for buffer in self.drafts():
            buffer.select_pending(kept)

    def static_view(self, tokens: int) -> StaticView:
        """What the retrieval level attends to in steps of that many tokens that are captured."""
        retrieval, window, drafts = self.retrieval, self.window, self.drafts()

        def find(layer: int, params: ops.AttentionParams) -> Held:
            index = self.place[layer]
            if params.window is None:
                return Held(partial(read_chosen, index), retrieval, index)
            return Held(partial(read_window, index), window.drafts, index)

        def read_chosen(index: int, attention: ops.RunningAttention, depths: Tensor, counts: Sequence[Tensor]) -> None:
            retrieval.store.attend_static(attention, index, counts[0])

        def read_window(index: int, attention: ops.RunningAttention, depths: Tensor, counts: Sequence[Tensor]) -> None:
            window.attend_static(attention, index, depths, counts[1])

        def chosen() -> int:
            return retrieval.filled * retrieval.shape.chunk if retrieval is not None else 0

        def committed() -> int:
            return window.committed if window is not None else 0

        most = retrieval.most_pending if window is None else window.drafts.capacity
        return StaticView(drafts, find, tokens, most, [chosen, committed])

    def reset(self) -> None:
        """Forget everything."""
        for cache in (self.full, self.retrieval, self.window):
            if cache is not None:
                cache.reset()
        self.length = 0

    def _sync(self, refreshed: int) -> None:
        if self.full is not None:
            self.retrieval.sync(self.full.tail.settled, self.full.tiled, self.length, refreshed)


class _TargetLevel:
    """What both levels share: the weights, and a step over nodes of a tree."""

    def __init__(self, model: PreTrainedModel, caches: TargetCaches) -> None:
        self.model, self.caches = model, caches
        self._nodes: Sequence[Node] = ()
        self._before: Sequence[Node] = ()
        self._steps: dict[int | None, TreeStep | None] = {}

    def _begin(self, nodes: Sequence[Node], before: Sequence[Node]) -> list[int]:
        """The step's nodes follow those that are pending: the positions of their tokens."""
        self._nodes, self._before = nodes, before
        self._steps.clear()
        return [self.caches.length + node.depth for node in nodes]

    def _step(self, params: ops.AttentionParams) -> TreeStep | None:
        """How the tokens of this step see each other within a window. None if they follow each other."""
        deepest = max(node.depth for node in self._nodes)
        window = params.window if params.window is not None and params.window <= deepest else None
        if window not in self._steps:
            self._steps[window] = self._make_step(window)
        return self._steps[window]

    def _make_step(self, window: int | None) -> TreeStep | None:
        nodes, before = self._nodes, self._before
        if all(node.parent is earlier for earlier, node in itertools.pairwise((*before, *nodes))):
            return None
        seen, depths = sight(nodes, before), np.array([node.depth for node in (*before, *nodes)])
        if window is not None:
            seen &= depths[len(before) :, None] - depths < window
        device = self.model.device
        return TreeStep(
            to_device(torch.from_numpy(seen), device), to_device(torch.from_numpy(depths[len(before) :]), device)
        )


class RetrievalLevel(_TargetLevel):
    """Level 1: attends to the retrieval cache; in sliding layers, to the same window as the target."""

    def __init__(self, model: PreTrainedModel, caches: TargetCaches, graphs: StepGraphs | None = None) -> None:
        super().__init__(model, caches)
        self.graphs = graphs

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: ops.AttentionParams) -> Tensor:
        """The view that the model attends over."""
        cache = self.caches.retrieval if params.window is None else self.caches.window
        return cache.attend_draft(self.caches.place[layer], query, key, value, params, self._step(params))

    def score(self, nodes: Sequence[Node], before: Sequence[Node]) -> Tensor:
        """Read T nodes of a tree: the logits after each, [T, V]. ``before``: those read already, in order."""
        tokens, positions = tokens_of(nodes), self._begin(nodes, before)
        depths = [node.depth for node in nodes]
        # In a window that is shorter than the tree, not all layers see the same guesses.
        if self.graphs is None or max(depths) >= min(self.caches.windows, default=max(depths) + 1):
            logits = run(self.model, tokens, positions, self, keep=len(nodes))
        else:
            logits = self.graphs(tokens, positions, self, len(nodes), sight(nodes, before), depths)
        for buffer in self.caches.drafts():
            buffer.end_step(len(nodes))
        return logits

    def keep(self, kept: Sequence[int]) -> None:
        """Forget what has been read, but for these (numbers in the order of reading)."""
        self.caches.keep_drafts(kept)


class FullLevel(_TargetLevel):
    """Level 2: attends to everything, and (with ``refresh``) chooses for the retrieval cache on the way."""

    def __init__(self, model: PreTrainedModel, caches: TargetCaches, refresh: Choosing) -> None:
        super().__init__(model, caches)
        self.refresh = refresh
        self._idle: Callable[[], object] | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: ops.AttentionParams) -> Tensor:
        """The view that the model attends over."""
        caches, index, step = self.caches, self.caches.place[layer], self._step(params)
        if params.window is not None:
            return caches.window.attend(index, query, key, value, params, step)

        def observe(packed: Tensor, baseline: Tensor, scaling: float) -> Refresh:
            anew = self.refresh == "each pass"
            return caches.retrieval.refresh(index, packed, baseline, scaling, caches.length, anew)

        observer = None if self.refresh == "never" else observe
        return caches.full.attend(index, query, key, value, params, observer, step, self._idle)

    def score(self, nodes: Sequence[Node], idle: Callable[[], object] | None = None) -> Tensor:
        """One pass: read the root and the guesses of a tree against the full cache: the logits after each, [T, V].

        ``idle`` is called whenever there is time for something else. What it reads with the same weights must not
        hinder this step: a model's steps may be nested.
        """
        full, self._idle = self.caches.full, idle
        if full is not None:
            full.begin_step()
        logits = run(self.model, tokens_of(nodes), self._begin(nodes, ()), self, keep=len(nodes))
        for cache in (self.caches.full, self.caches.window):
            if cache is not None:
                cache.end_step(len(nodes))
        return logits

    def slack(self) -> Slack:
        """What the last pass left time for. To be asked once its logits have been looked at."""
        return self.caches.full.stream.slack() if self.caches.full is not None else Slack()

    def commit(self, kept: Sequence[int]) -> None:
        """Accept these of the tokens read (their numbers, ascending), and forget the others."""
        self.caches.commit(kept)
