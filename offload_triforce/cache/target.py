"""All caches of one target model: full cache, retrieval cache, windows of sliding layers, states of recurrent ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
        self.whole = True  # False: something was interrupted in the middle of a change, and only ``reset`` helps

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

    def begin_fill(self) -> None:
        """A prefill begins that reads on behind what is held. Nothing is pending; the retrieval cache chooses anew."""
        self.drop_pending()
        with self._changing():
            if self.full is not None:
                self.full.begin_fill()
                self.retrieval.reset()

    def held(self, window: int | None) -> int:
        """Tokens that ``load`` brings, of a layer with that window."""
        return self.length if window is None else min(self.length, self.window.reach)

    def load(self, layer: int, window: int | None, kv: Tensor) -> None:
        """The newest ``held`` tokens of a layer, into ``kv`` [2, K, held, D] on the device. Layers in order."""
        (self.full if window is None else self.window).load(self.place[layer], kv)

    def load_state(self, layer: int) -> tuple[Tensor, Tensor]:
        """The same of a recurrent layer, see ``RecurrentCache.load``."""
        return self.recurrent.load(self.place[layer])

    def land_fill(self) -> None:
        """Before ``filled``, in the middle of a prefill: what has left is in host memory.

        Raises:
            MemoryLimitError: see ``Leaving.wait``.
        """
        if self.full is not None:
            self.full.landed()
            self.full.stream.device.catch_up()

    def filled(self, layer: int, window: int | None, start: int, stop: int) -> Tensor:
        """A copy of the keys and values that ``fill`` has put down of tokens [start, stop), [2, K, n, D] for the host.

        All, or those that windows reach; ``stop`` tokens is what the layer was given. See ``load_state`` for others.
        """
        cache = self.full if window is None else self.window
        return cache.filled(self.place[layer], start, stop)

    def end_step(self, tokens: int) -> None:
        """A step of the target is through all layers: its tokens are pending."""
        for cache in self._committing():
            cache.end_step(tokens)

    def end_fill(self, tokens: int) -> None:
        """All layers have been filled with ``tokens`` tokens."""
        with self._changing():
            for cache in (self.full, self.window, self.hidden):
                if cache is not None:
                    cache.end_fill(tokens)
            self.length = tokens
            self._sync(tokens)

    def commit(self, kept: Sequence[int]) -> None:
        """The target accepts these of its pending tokens (their numbers, ascending). What is drafted stays.

        Raises:
            MemoryLimitError: a tile has no room in host memory. Nothing has changed then.
        """
        self._land()
        refreshed = self.length
        with self._changing():
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

    def _land(self) -> None:
        """Before a change: what could go wrong with tiles on their way does so here, where nothing is half done."""
        if self.full is not None:
            self.full.landed()

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

    def drop_pending(self) -> None:
        """Forget what nobody has judged, on both levels."""
        self._land()
        with self._changing():
            for cache in self._committing():
                cache.commit(0)
            self.keep_drafts([])

    def can_cut(self, tokens: int) -> bool:
        """Whether ``cut`` can go back to the first ``tokens`` tokens: a state cannot, and a window not far."""
        gone = self.length - tokens
        return not gone or (self.recurrent is None and (not self.window or self.window.can_drop(gone, self.length)))

    def cut(self, tokens: int, parts: Snapshot | None = None) -> None:
        """Keep the first ``tokens`` tokens. The retrieval cache's choice goes.

        ``parts``: a ``checkpoint`` of just those tokens, for what cannot be cut.
        """
        self.drop_pending()
        with self._changing():
            if self.full is not None:
                self.full.cut(tokens)
                self.retrieval.reset()
            if parts is None and self.window is not None:
                self.window.drop(self.length - tokens)
            if self.hidden is not None:
                self.hidden.cut(tokens)
            for name, cache in self._named():
                if own := _named_parts(parts or {}, name):
                    cache.restore(own)
            self.length = tokens

    def still(self) -> None:
        """Nothing is pending, and all that is held can be read by the host."""
        self.drop_pending()
        with self._changing():
            if self.full is not None:
                self.full.still()

    def adopt(self, tokens: int, read: Callable[[int, int, int], Tensor], parts: Snapshot) -> None:
        """Hold a text that was read before, see ``FullCache.adopt``. ``parts``: a ``checkpoint`` of its tokens."""
        self.reset()
        self.still()
        with self._changing():
            if self.full is not None:
                self.full.adopt(tokens, read)
            for name, cache in self._named():
                if own := _named_parts(parts, name):
                    cache.restore(own)
            if self.hidden is not None:
                self.hidden.end_fill(tokens)
            self.length = tokens

    def reset(self) -> None:
        """Forget everything."""
        with self._changing(anew=True):
            for _, cache in self._named():
                cache.reset()
            self.length = 0

    def checkpoint(self) -> dict[str, Tensor]:
        """What ``cut`` cannot bring back of the committed tokens, by name, in host memory. While nothing is pending."""
        return self._snapshots("window", "recurrent")

    def snapshot_text(self) -> dict[str, Tensor]:
        """All that the committed tokens have left, but for tiles and the choice of chunks: those go with ``restore``.

        Between two passes, while nothing is pending.
        """
        return {"length": torch.tensor([self.length]), **self._snapshots("full", "window", "recurrent", "hidden")}

    def snapshot(self) -> dict[str, Tensor]:
        """The same with the choice."""
        return {**self.snapshot_text(), **self._snapshots("retrieval")}

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of these caches, over tiles that hold what they held then; drafts are dropped."""
        with self._changing(anew=True):
            for name, cache in self._named():
                own = _named_parts(snapshot, name)
                cache.restore(own) if own else cache.reset()
            self.length = int(snapshot["length"])

    def _snapshots(self, *wanted: str) -> dict[str, Tensor]:
        """Of these caches, as far as there are such."""
        return {f"{n}.{key}": p for n, c in self._named() if n in wanted for key, p in c.snapshot().items()}

    @contextmanager
    def _changing(self, anew: bool = False) -> Iterator[None]:
        """What is interrupted in here leaves the caches in no state to go on from. ``anew``: nothing of it is left."""
        before, self.whole = self.whole, False
        yield
        self.whole = before or anew

    def _named(self) -> list[tuple[str, FullCache | RetrievalCache | WindowCache | RecurrentCache | HiddenWindow]]:
        named = [("full", self.full), ("retrieval", self.retrieval), ("window", self.window)]
        named += [("recurrent", self.recurrent), ("hidden", self.hidden)]
        return [(name, cache) for name, cache in named if cache is not None]

    def _sync(self, refreshed: int) -> None:
        if self.full is not None:
            self.retrieval.sync(self.full.tail.settled, self.full.tiled, self.length, refreshed)


def _named_parts(snapshot: Snapshot, name: str) -> Snapshot:
    """Those of one cache."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): part for key, part in snapshot.items() if key.startswith(prefix)}
