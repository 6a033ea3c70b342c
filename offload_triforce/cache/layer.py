"""The protocol of the caches: how a stack of layers remembers a text, whatever it is that it remembers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from offload_triforce.kernels.ops import AttentionParams
from offload_triforce.scheduler.store import Leaving

# What a cache holds of its committed tokens, by name, in host memory. Numbers are int64 tensors of one element, so that
# a snapshot can be written to a file as it is.
Snapshot = Mapping[str, Tensor]


@runtime_checkable
class CacheLayers(Protocol):
    """What some layers of a model remember of one text: keys and values, or a recurrent state.

    The tokens of a forward step are *pending* from ``end_step`` on, until somebody says which of them belong to the
    text: ``select`` keeps those on the accepted path of a tree, ``commit`` makes them part of what is remembered, and
    nothing else changes that. In between, a cache of keys and values moves rows together, and a recurrent one folds
    the nodes of the path into its state.

    How a layer's new tokens reach a cache depends on what the layer computes, so it is no part of the protocol: caches
    of keys and values have ``attend(layer, query, key, value, params, step)``.
    """

    @property
    def pending(self) -> int:
        """Tokens that wait for a verdict."""

    def end_step(self, tokens: int) -> None:
        """A forward step of that many tokens is through all layers: they are pending."""

    def select(self, kept: Sequence[int]) -> None:
        """Keep these of the pending tokens (their numbers, ascending), in order, and drop the others.

        Raises:
            IndexError: not such numbers.
        """

    def commit(self, tokens: int) -> None:
        """The first ``tokens`` pending tokens belong to the text; the others are dropped.

        Raises:
            IndexError: there are not so many.
        """

    def reset(self) -> None:
        """Forget everything."""

    def snapshot(self) -> Snapshot:
        """A copy of what the committed tokens have left. Pending ones are not in it."""

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this cache, or of one of the same sizes. Pending tokens are dropped."""


@runtime_checkable
class FilledLayers(CacheLayers, Protocol):
    """Layers that a prefill fills, one after the other, with all tokens of a prompt."""

    def fill(self, layer: int, kv: Tensor, queries: Tensor, params: AttentionParams) -> Leaving | None:
        """One layer's whole prompt, on an empty cache. Follow the last layer with ``end_fill``.

        Args:
            layer: counted among the layers of this cache.
            kv: [2, K, n, D]. queries: the newest ones, [H, m, D]. params: of the layer's attention.

        Returns:
            The copies that still read ``kv``, if there are any: wait for those of a token before overwriting it.
        """

    def end_fill(self, tokens: int) -> None:
        """All layers have been filled with that many tokens."""
