"""Levels 1 and 2: the target's weights over its retrieval cache, and over its full cache."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from offload_triforce.cache.buffer import TreeStep
from offload_triforce.cache.recurrent import OverNodes, PendingNodes
from offload_triforce.cache.retrieval import Refresh
from offload_triforce.cache.target import TargetCaches
from offload_triforce.graphs.steps import StepGraphs
from offload_triforce.kernels import ops
from offload_triforce.model.adapter import run
from offload_triforce.scheduler.device import DRAFT, VERIFY, to_device
from offload_triforce.scheduler.pipeline import Slack
from offload_triforce.speculation.tree import Node, tokens_of, tree_mask

# When chunks are chosen for the retrieval cache: anew in each pass, once after the prefill, or not in passes at all.
Choosing = Literal["each pass", "once", "never"]


class _Level(OverNodes):
    """What both levels share: the weights, and a step over nodes of a tree."""

    def __init__(self, model: PreTrainedModel, caches: TargetCaches, nodes: PendingNodes | None) -> None:
        """``nodes``: where recurrent layers keep this level's tokens."""
        super().__init__(nodes)
        self.model, self.caches = model, caches
        self._nodes: Sequence[Node] = ()
        self._before: Sequence[Node] = ()
        self._steps: dict[int | None, TreeStep | None] = {}

    def _span(self, track: str, nodes: Sequence[Node]) -> AbstractContextManager[None]:
        """Trace what is issued inside, if the link is traced."""
        full = self.caches.full
        return nullcontext() if full is None else full.stream.device.span(track, f"{len(nodes)} tokens")

    def _begin(self, nodes: Sequence[Node], before: Sequence[Node]) -> list[int]:
        """The step's nodes follow those that are pending: the positions of their tokens."""
        self._nodes, self._before = nodes, before
        self._steps.clear()
        if self._states is not None:
            seen = to_device(torch.from_numpy(tree_mask(nodes, before)), self.model.device)
            self._states.begin(self._states.nodes.step(seen))
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
        seen, depths = tree_mask(nodes, before), np.array([node.depth for node in (*before, *nodes)])
        if window is not None:
            seen &= depths[len(before) :, None] - depths < window
        device = self.model.device
        return TreeStep(
            to_device(torch.from_numpy(seen), device), to_device(torch.from_numpy(depths[len(before) :]), device)
        )


class RetrievalLevel(_Level):
    """Level 1: attends to the retrieval cache; in sliding layers, to the same window as the target."""

    def __init__(self, model: PreTrainedModel, caches: TargetCaches, graphs: StepGraphs | None = None) -> None:
        super().__init__(model, caches, caches.recurrent and caches.recurrent.drafts)
        self.graphs = graphs

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: ops.AttentionParams) -> Tensor:
        """The view that the model attends over."""
        cache = self.caches.retrieval if params.window is None else self.caches.window
        return cache.attend_draft(self.caches.place[layer], query, key, value, params, self._step(params))

    def score(self, nodes: Sequence[Node], before: Sequence[Node]) -> Tensor:
        """Read T nodes of a tree: the logits after each, [T, V]. ``before``: those read already, in order."""
        with self._span(DRAFT, nodes):
            tokens, positions = tokens_of(nodes), self._begin(nodes, before)
            depths = [node.depth for node in nodes]
            # In a window that is shorter than the tree, not all layers see the same draft tokens.
            if self.graphs is None or max(depths) >= min(self.caches.windows, default=max(depths) + 1):
                logits = run(self.model, tokens, positions, self, keep=len(nodes))
            else:
                logits = self.graphs(tokens, positions, self, len(nodes), tree_mask(nodes, before), depths)
            self.caches.end_drafts(len(nodes))
        return logits

    def see(self, hidden: Tensor) -> None:
        """The hidden states [T, width] of the step's nodes: kept with them, where a drafter reads such.

        They are copied: a captured step's are good until the next one.
        """
        if self.caches.hidden is not None:
            for node, row in zip(self._nodes, hidden.clone(), strict=True):
                node.state.hidden = row

    def keep(self, kept: Sequence[int]) -> None:
        """Forget what has been read, but for these (numbers in the order of reading)."""
        self.caches.keep_drafts(kept)


class TargetLevel(_Level):
    """Level 2: attends to everything, and (with ``refresh``) chooses for the retrieval cache on the way."""

    def __init__(
        self,
        model: PreTrainedModel,
        caches: TargetCaches,
        refresh: Choosing,
        rests: Callable[[], bool] = lambda: False,
    ) -> None:
        """``rests``: whether the retrieval level is not used for now, so that its choice can stay as it is."""
        super().__init__(model, caches, caches.recurrent and caches.recurrent.nodes)
        self.refresh, self._rests = refresh, rests
        self._idle: Callable[[], object] | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: ops.AttentionParams) -> Tensor:
        """The view that the model attends over."""
        caches, index, step = self.caches, self.caches.place[layer], self._step(params)
        if params.window is not None:
            return caches.window.attend(index, query, key, value, params, step)

        def observe(packed: Tensor, baseline: Tensor, scaling: float) -> Refresh:
            anew = self.refresh == "each pass" and not self._rests()
            return caches.retrieval.refresh(index, packed, baseline, scaling, caches.length, anew)

        observer = None if self.refresh == "never" else observe
        return caches.full.attend(index, query, key, value, params, observer, step, self._idle)

    def score(self, nodes: Sequence[Node], idle: Callable[[], object] | None = None) -> Tensor:
        """One pass: read the root and the draft tokens of a tree against the full cache: the logits after each, [T, V].

        ``idle`` is called whenever there is time for something else. What it reads with the same weights must not
        hinder this step: a model's steps may be nested.
        """
        full, self._idle = self.caches.full, idle
        with self._span(VERIFY, nodes):
            if full is not None:
                full.begin_step()
            logits = run(self.model, tokens_of(nodes), self._begin(nodes, ()), self, keep=len(nodes))
            self.caches.end_step(len(nodes))
        return logits

    def see(self, hidden: Tensor) -> None:
        """The hidden states [T, width] of the pass's nodes, pending, where a drafter reads such."""
        if self.caches.hidden is not None:
            self.caches.hidden.see(hidden)

    def slack(self) -> Slack:
        """What the last pass left time for. To be asked once its logits have been looked at."""
        return self.caches.full.stream.slack() if self.caches.full is not None else Slack()

    def commit(self, kept: Sequence[int]) -> None:
        """Accept these of the tokens read (their numbers, ascending), and forget the others."""
        self.caches.commit(kept)
