"""A device buffer that grows at its end and takes tokens back: the piece that every cache is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from offload_triforce.cache.layer import Snapshot
from offload_triforce.kernels import ops
from offload_triforce.scheduler.device import to_device


class TreeStep(NamedTuple):
    """How T new tokens of a tree of draft tokens see each other and the pending tokens before them.

    ``mask`` (bool [T, M]) covers all M pending tokens, the T new ones last. ``depths`` (int64 [T]) are the new tokens'
    places in the text behind the committed ones: 0 is the first.
    """

    mask: Tensor
    depths: Tensor


def check_kept(kept: Sequence[int], pending: int) -> None:
    """Numbers of pending tokens to keep: ascending.

    Raises:
        IndexError: not such numbers.
    """
    if list(kept) != sorted(set(kept)) or (len(kept) and not 0 <= kept[0] <= kept[-1] < pending):
        raise IndexError(f"cannot keep tokens {list(kept)} of {pending} pending ones")


def move_together(kept: Sequence[int], *parts: Tensor, dim: int) -> None:
    """Move the ``kept`` tokens of each part, along its dimension ``dim``, to the front, in order."""
    same = next((i for i, number in enumerate(kept) if i != number), len(kept))  # so many stay where they are
    if same == len(kept):
        return
    source = to_device(torch.tensor(kept[same:], dtype=torch.long), parts[0].device)
    for part in parts:
        part.narrow(dim, same, len(source)).copy_(part.index_select(dim, source))


class GrowingBuffer:
    """Keys and values of consecutive tokens for a stack of layers, [layers, 2, K, capacity, D].

    Index 0 of the second dimension is keys, 1 is values. Of the ``length`` tokens held, the last ``pending`` wait
    for a verdict. A forward step calls ``write`` (or ``attend``) once per layer and then ``end_step``, which makes
    its tokens pending; ``commit`` and ``settle`` are the only ways to accept them. Nothing is allocated later.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.kv = torch.zeros(layers, 2, kv_heads, capacity, head_dim, dtype=dtype, device=device)
        self.length = 0
        self.pending = 0
        self._attention = ops.RunningAttention()

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return self.kv.shape[3]

    @property
    def committed(self) -> int:
        """Tokens held that are settled."""
        return self.length - self.pending

    @property
    def settled(self) -> Tensor:
        """Committed tokens of all layers, [layers, 2, K, committed, D] (a view)."""
        return self.kv[:, :, :, : self.committed]

    def write(self, layer: int, key: Tensor, value: Tensor) -> Tensor:
        """Put one layer's new tokens ([K, T, D] each) at the end; return all of that layer, [2, K, length + T, D].

        Raises:
            IndexError: the tokens do not fit.
        """
        end = self.length + key.shape[1]
        if end > self.capacity:
            raise IndexError(f"{end} tokens do not fit a buffer of {self.capacity}")
        self.kv[layer, 0, :, self.length : end] = key
        self.kv[layer, 1, :, self.length : end] = value
        return self.kv[layer, :, :, :end]

    def replace(self, layer: int, kv: Tensor) -> None:
        """Put ``kv`` [2, K, n, D] in the place of all that one layer holds. Set ``length`` when all layers have theirs.

        Raises:
            IndexError: the tokens do not fit.
        """
        if kv.shape[2] > self.capacity:
            raise IndexError(f"{kv.shape[2]} tokens do not fit a buffer of {self.capacity}")
        self.kv[layer, :, :, : kv.shape[2]] = kv

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        params: ops.AttentionParams,
        step: TreeStep | None = None,
    ) -> Tensor:
        """Write T new tokens and attend from them to all that is held: query [H, T, D] -> [H, T, D].

        Without ``step`` the new tokens follow each other, and all that is pending.
        """
        self._attention.start(query, key.shape[0], params)
        self.attend_on(self._attention, layer, key, value, params, step)
        return self._attention.finish()

    def attend_on(
        self,
        attention: ops.RunningAttention,
        layer: int,
        key: Tensor,
        value: Tensor,
        params: ops.AttentionParams,
        step: TreeStep | None = None,
    ) -> Tensor:
        """The same for an attention that has begun and goes on elsewhere. Returns what ``write`` returns."""
        held = self.write(layer, key, value)
        tree_mask = self.tree_mask(key.shape[1], params.window, step)
        first = 0 if params.window is None else max(0, held.shape[2] - params.window - tree_mask.mask.shape[1] + 1)
        if tree_mask.positions is not None:
            tree_mask = tree_mask._replace(positions=tree_mask.positions - first)
        attention.update(held[0, :, first:], held[1, :, first:], tree_mask)
        return held

    def tree_mask(self, tokens: int, window: int | None, step: TreeStep | None) -> ops.TreeMask:
        """What is special about the newest keys, once that many new ones are written."""
        if step is None:
            return ops.own_tokens(tokens, self.kv.device)
        return ops.TreeMask(step.mask, None if window is None else step.depths + self.committed)

    def end_step(self, tokens: int) -> None:
        """The step is through all layers: its tokens are held, and pending."""
        self.length += tokens
        self.pending += tokens

    def select(self, kept: Sequence[int]) -> None:
        """Keep these of the pending tokens (their numbers, ascending), moved together, and drop the others.

        Raises:
            IndexError: not such numbers.
        """
        check_kept(kept, self.pending)
        start, count = self.committed, len(kept)
        move_together(kept, self.kv[:, :, :, start:], dim=3)
        self.length, self.pending = start + count, count

    def commit(self, tokens: int) -> None:
        """Accept the first ``tokens`` pending tokens and drop the others."""
        self.settle(tokens)
        self.length, self.pending = self.committed, 0

    def settle(self, tokens: int) -> None:
        """Accept the first ``tokens`` pending tokens; the others stay pending."""
        if not 0 <= tokens <= self.pending:
            raise IndexError(f"cannot accept {tokens} of {self.pending} pending tokens")
        self.pending -= tokens

    def drop_front(self, tokens: int) -> None:
        """Forget the oldest ``tokens`` and move the rest to the front."""
        if not 0 <= tokens <= self.committed:
            raise IndexError(f"cannot drop {tokens} of {self.committed} committed tokens")
        if not tokens:
            return
        for start in range(tokens, self.length, tokens):  # parts that do not overlap
            part = self.kv[:, :, :, start : min(start + tokens, self.length)]
            self.kv[:, :, :, start - tokens : start - tokens + part.shape[3]] = part
        self.length -= tokens

    def reset(self) -> None:
        """Forget everything."""
        self.length = self.pending = 0

    def snapshot(self) -> dict[str, Tensor]:
        """See ``CacheLayers``: the committed keys and values."""
        return {"kv": self.settled.to("cpu", copy=True)}

    def restore(self, snapshot: Snapshot) -> None:
        """See ``CacheLayers``."""
        self.length, self.pending = snapshot["kv"].shape[3], 0
        self.settled.copy_(snapshot["kv"])
