"""All caches of one target model: full cache, retrieval cache, windows of sliding layers, states of recurrent ones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from offload_triforce.cache.buffer import GrowingBuffer
from offload_triforce.cache.full import FullCache
from offload_triforce.cache.hidden import HiddenWindow
from offload_triforce.cache.layer import Snapshot
from offload_triforce.cache.recurrent import PendingNodes, RecurrentCache
from offload_triforce.cache.retrieval import RetrievalCache
from offload_triforce.cache.static import Held, StaticView
from offload_triforce.cache.window import WindowCache
from offload_triforce.kernels import ops
from offload_triforce.scheduler.store import Leaving


class TargetCaches:
    """All caches of the target. A model may lack layers of any kind, but it has full or sliding ones."""

    def __init__(
        self,
        groups: Sequence[Sequence[int]],
        full: FullCache | None,
        retrieval: RetrievalCache | None,
        window: WindowCache | None,
        recurrent: RecurrentCache | None = None,
        hidden: HiddenWindow | None = None,
    ) -> None:
        """``groups``: numbers of the full, the sliding and the recurrent layers, each ascending.

        ``hidden``: the newest hidden states, where a drafter reads them.
        """
        self.full, self.retrieval, self.window, self.recurrent = full, retrieval, window, recurrent
        self.hidden = hidden
        self.place = {layer: i for group in groups for i, layer in enumerate(group)}
        self.windows = [] if window is None else window.windows
        self.length = 0  # committed tokens of the text

    def fill(self, layer: int, kv: Tensor, queries: Tensor, params: ops.AttentionParams) -> Leaving | None:
        """See ``FilledLayers``; ``layer`` is counted in the model. The retrieval cache chooses."""
        index = self.place[layer]
        if params.window is not None:
            return self.window.fill(index, kv, queries, params)
        leaving = self.full.fill(index, kv, queries, params)
        self.retrieval.fill(index, kv, queries, params)
        return leaving

    def fill_state(self, layer: int, state: Tensor, tail: Tensor) -> None:
        """The same of a recurrent layer, see ``RecurrentCache.fill``."""
        self.recurrent.fill(self.place[layer], state, tail)

    def end_step(self, tokens: int) -> None:
        """A step of the target is through all layers: its tokens are pending."""
        for cache in self._committing():
            cache.end_step(tokens)

    def end_fill(self, tokens: int) -> None:
        """All layers have been filled with ``tokens`` tokens."""
        for cache in (self.full, self.window, self.hidden):
            if cache is not None:
                cache.end_fill(tokens)
        self.length = tokens
        self._sync(tokens)

    def commit(self, kept: Sequence[int]) -> None:
        """The target accepts these of its pending tokens (their numbers, ascending). What is drafted stays."""
        refreshed = self.length
        for cache in self._committing():
            cache.select(kept)
            cache.commit(len(kept))
        self.length += len(kept)
        self._sync(refreshed)

    def drafts(self) -> list[GrowingBuffer]:
        """Where keys and values of the retrieval level's draft tokens are pending."""
        window = None if self.window is None else self.window.drafts
        return [buffer for buffer in (self.retrieval, window) if buffer is not None]

    def end_drafts(self, tokens: int) -> None:
        """A step of the retrieval level is through all layers: its tokens are pending."""
        for pending in self._drafting():
            pending.end_step(tokens)

    def keep_drafts(self, kept: Sequence[int]) -> None:
        """Keep these of the retrieval level's draft tokens (their numbers, ascending), and drop the others."""
        for pending in self._drafting():
            pending.select(kept)

    def _drafting(self) -> list[GrowingBuffer | PendingNodes]:
        nodes = [] if self.recurrent is None else [self.recurrent.drafts]
        return [*self.drafts(), *nodes]

    def _committing(self) -> list[FullCache | WindowCache | RecurrentCache | HiddenWindow]:
        return [cache for cache in (self.full, self.window, self.recurrent, self.hidden) if cache is not None]

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

        nodes = None if self.recurrent is None else self.recurrent.drafts
        most = retrieval.most_pending if window is None else window.drafts.capacity
        return StaticView(drafts, find, tokens, most, [chosen, committed], nodes)

    def reset(self) -> None:
        """Forget everything."""
        for _, cache in self._named():
            cache.reset()
        self.length = 0

    def snapshot(self) -> dict[str, Tensor]:
        """All that the committed tokens have left, but for the tiles. Between two passes, while nothing is pending."""
        parts = {f"{name}.{key}": part for name, cache in self._named() for key, part in cache.snapshot().items()}
        return {"length": torch.tensor([self.length]), **parts}

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of these caches, over tiles that hold what they held then; drafts are dropped."""
        for name, cache in self._named():
            prefix = f"{name}."
            own = {key.removeprefix(prefix): part for key, part in snapshot.items() if key.startswith(prefix)}
            cache.restore(own)
        self.length = int(snapshot["length"])

    def _named(self) -> list[tuple[str, FullCache | RetrievalCache | WindowCache | RecurrentCache | HiddenWindow]]:
        named = [("full", self.full), ("retrieval", self.retrieval), ("window", self.window)]
        named += [("recurrent", self.recurrent), ("hidden", self.hidden)]
        return [(name, cache) for name, cache in named if cache is not None]

    def _sync(self, refreshed: int) -> None:
        if self.full is not None:
            self.retrieval.sync(self.full.tail.settled, self.full.tiled, self.length, refreshed)
