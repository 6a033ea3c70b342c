"""Scoring and taking the chunks of tile after tile in Triton, with everything but pointers bound beforehand."""

from __future__ import annotations

import weakref
from collections.abc import Hashable

import torch
from torch import Tensor

from offload_triforce.kernels.chunk_scores import score_launch
from offload_triforce.kernels.chunk_selection import Workspace, make_workspace, take_launch
from offload_triforce.kernels.launch import Bound, aligned
from offload_triforce.kernels.types import ChunkSelection, CodedChunks


class TileChoice:
    """The Triton side of ``ops.RunningChoice``. One object serves layer after layer, on one stream at a time."""

    def __init__(self) -> None:
        self._bound: dict[Hashable, dict[Hashable, tuple[Bound, Bound, Tensor]]] = {}
        self._workspaces: dict[Hashable, Workspace] = {}

    def start(
        self,
        packed: Tensor,
        baseline: Tensor,
        scaling: float,
        chunk: int,
        selection: ChunkSelection,
        slots: Tensor | CodedChunks,
    ) -> None:
        """Another layer, usually with the same shapes."""
        self._packed, self._baseline, self._scaling, self._chunk = packed, baseline, scaling, chunk
        self._selection, self._slots = selection, slots
        self._stores = tuple(slots) if isinstance(slots, CodedChunks) else (slots,)
        tensors = (packed, baseline, *selection, *self._stores)
        shape = (scaling, chunk, *((t.shape, t.stride(), t.dtype, t.device) for t in tensors))
        self._of_shape = self._bound.setdefault(shape, {})
        self._aligned = aligned(packed)
        self._of_layer: tuple[Bound, Bound, Tensor] | None = None  # what was launched last, with this layer's tensors
        self._last: weakref.ref[Tensor] | None = None  # the tile that it was launched with

    def see(self, first: int, kv: Tensor) -> None:
        """Score the chunks ``first``, first + 1, ... of a tile, [2, K, C*chunk, D], and take the best: two launches."""
        if self._last is None or self._last() is not kv:  # where it is, as with decoded tiles, nothing has changed
            usual, which = self._aligned and aligned(kv), (kv.shape, kv.stride())
            bound = self._of_shape.get(which) if usual else None
            if bound is None:
                bound = self._bind(first, kv)
                if usual:
                    self._of_shape[which] = bound
                return
            if bound is not self._of_layer:
                bound[0].keep(self._packed, self._baseline, self._selection.held)
                bound[1].keep(*self._selection, *self._stores)
                self._of_layer = bound
            self._last = weakref.ref(kv)  # its memory must not stay for this
        scoring, taking, _ = self._of_layer
        scoring(kv, first)
        taking(kv, first)

    def _bind(self, first: int, kv: Tensor) -> tuple[Bound, Bound, Tensor]:
        """Launch both for the first time. With them comes the memory between them, which has to live as long."""
        heads, chunks = kv.shape[1], kv.shape[2] // self._chunk
        offered = torch.empty(heads, chunks, dtype=torch.float32, device=kv.device)
        selection, slots = self._selection, self._slots
        of = (self._packed, kv[0], self._chunk, self._scaling, self._baseline, selection.held, offered, first)
        scoring = Bound(score_launch(*of), ("key", "first"), ("query", "baseline", "held"))
        size = (selection.scores.shape, kv.device)
        if size not in self._workspaces:
            self._workspaces[size] = make_workspace(selection)
        stores = slots._fields if isinstance(slots, CodedChunks) else ("store",)
        launch = take_launch(selection, offered, first, kv, slots, self._workspaces[size])
        return scoring, Bound(launch, ("kv", "first"), (*selection._fields, *stores)), offered
