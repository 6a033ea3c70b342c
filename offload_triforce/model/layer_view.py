"""What the layer that a prefill fills makes of the text, and how the layer's attention and recurrence see it."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from offload_triforce.kernels import ops
from offload_triforce.model.recurrent import OwnConvolution, OwnRule
from offload_triforce.scheduler.store import Leaving


class Beginning(Protocol):
    """The beginning of a text that has been read before, for the layers that read on behind it."""

    length: int

    def held(self, window: int | None) -> int:
        """How many of its newest tokens ``load`` brings, for a layer with that window."""

    def load(self, layer: int, window: int | None, kv: Tensor) -> None:
        """Their keys and values, into ``kv`` [2, K, held, D]. Layers come in order."""

    def load_state(self, layer: int) -> tuple[Tensor, Tensor]:
        """Of a recurrent layer: its state [Hv, Dk, Dv] and its convolution's newest inputs [W - 1, C], to be kept."""


class AttentionPart(NamedTuple):
    """What a layer that attends makes of a text: ``kv`` [2, K, n, D], the newest ``queries`` [H, m, D], ``params``.

    Where a text is read on, ``kv`` begins with what was held of its beginning.
    """

    kv: Tensor
    queries: Tensor
    params: ops.AttentionParams


class RecurrentPart(NamedTuple):
    """What a recurrent layer makes of it: ``state`` [Hv, Dk, Dv], the newest inputs of its convolution [W - 1, C]."""

    state: Tensor
    tail: Tensor


LayerPart = AttentionPart | RecurrentPart


def _to_host(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", copy=True)


class LayerView:
    """What the layer that is being filled makes of the text: its KV, [2, K, n, D], and last queries; or its state."""

    def __init__(self, tokens: int, queries: int, before: Beginning | None) -> None:
        self.tokens, self.keep_queries, self.before = tokens, queries, before
        self._room: Tensor | None = None
        self.index = self.length = 0  # number of the layer; tokens of its KV
        self.queries: Tensor | None = None
        self.params = ops.AttentionParams(1.0)
        self.leaving: Leaving | None = None  # copies of an earlier layer, which share the buffer
        self.state: Tensor | None = None
        self.tail: Tensor | None = None
        self._held = 0  # tokens of its KV that were held before
        self._settled: tuple[int, Tensor | None, Tensor | None, Tensor | None] = 0, None, None, None

    def begin(self, index: int) -> None:
        """The next layer's turn."""
        self.index, self.length, self.queries, self.state, self.tail = index, 0, None, None, None
        self._held = 0

    def part(self) -> LayerPart:
        """What has become of the layer."""
        if self.state is not None:
            return RecurrentPart(self.state, self.tail)
        return AttentionPart(self._room[:, :, : self.length], self.queries, self.params)

    def settle(self) -> None:
        """A step through the layer is over: what a later one leaves that is interrupted does not count."""
        self._settled = self.length, self.queries, self.state, self.tail

    def halted(self) -> LayerPart:
        """What the steps that are over have made of the layer, without what was held; in host memory."""
        length, queries, state, tail = self._settled
        if state is not None:
            return RecurrentPart(_to_host(state), _to_host(tail))
        return AttentionPart(_to_host(self._room[:, :, self._held : length]), _to_host(queries), self.params)

    def put_back(self, part: LayerPart, device: torch.device) -> None:
        """The layer as it was when another prefill of the same tokens was stopped, behind what is held."""
        if isinstance(part, RecurrentPart):
            self.state, self.tail = part.state.to(device), part.tail.to(device)
            return
        kv = part.kv
        self._begin_layer(torch.empty(kv.shape[1], 0, kv.shape[3], dtype=kv.dtype, device=device), part.params)
        end = self.length + kv.shape[2]
        if self.leaving is not None:
            self.leaving.wait(end)
        for room, held in zip(self._room.flatten(0, 1), kv.flatten(0, 1), strict=True):
            room[self.length : end].copy_(held)  # each in one piece, so that the device needs no room beside
        self.length, self.queries, self.params = end, part.queries.to(device), part.params

    def convolve(self, convolution: ops.Convolution, own: OwnConvolution) -> Tensor:
        """See ``RecurrentView``."""
        inputs, news = convolution.inputs, convolution.weight.shape[1] - 1
        if self.tail is None and self.before is not None:
            self.state, self.tail = self.before.load_state(self.index)
        if self.tail is None:  # a text begins with nothing, which is zero
            self.tail = inputs.new_zeros(news, inputs.shape[1])
        whole = torch.cat([self.tail, inputs])
        self.tail = whole[-news:].clone()
        return own(whole)[news:]

    def recur(self, _: ops.DeltaTokens, own: OwnRule) -> Tensor:
        """See ``RecurrentView``."""
        output, state = own(self.state)
        self.state = state.float()
        return output

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: ops.AttentionParams) -> Tensor:
        """See ``adapter.View``: the new tokens see all before them."""
        if self.length == 0:
            self._begin_layer(key, params)
        end = self.length + key.shape[1]
        if self.leaving is not None:
            self.leaving.wait(end)
        kv = self._room[:, :, :end]
        kv[0, :, self.length :], kv[1, :, self.length :] = key, value
        self.length, self.params = end, params
        newest = query[:, -self.keep_queries :]
        if self.queries is not None and newest.shape[1] < self.keep_queries:  # a short last chunk
            newest = torch.cat([self.queries, newest], dim=1)[:, -self.keep_queries :]
        self.queries = newest
        return ops.prefill_attention(query, kv[0], kv[1], params)

    def _begin_layer(self, key: Tensor, params: ops.AttentionParams) -> None:
        """Room for a layer's keys and values, with those that are held."""
        heads, dim = key.shape[0], key.shape[2]
        before = 0 if self.before is None else self.before.length
        if self._room is None or (self._room.shape[1], self._room.shape[3]) != (heads, dim):
            self._room = key.new_empty(2, heads, before + self.tokens, dim)
        if self.before is None:
            return
        self.length = self._held = self.before.held(params.window)
        if self.leaving is not None:
            self.leaving.wait(self.length)
        self.before.load(self.index, params.window, self._room[:, :, : self.length])
