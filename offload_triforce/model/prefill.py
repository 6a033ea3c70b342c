"""Layer-major prefill: all chunks of the prompt through one layer, then the next.

Only one layer's KV is on the device at a time. Host traffic is one copy of each layer's KV from the device to the
host and nothing back, but for the hidden states where they wait in host memory. No family-specific code: the base
model is run once per chunk with every layer replaced by an identity that records its arguments, and the layers are then
replayed in their own order.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from offload_triforce.kernels import ops
from offload_triforce.model.embeddings import embed
from offload_triforce.model.layers import layers_of
from offload_triforce.model.layout import ModelLayout
from offload_triforce.model.lock import do_and_undo
from offload_triforce.model.recurrent import OwnConvolution, OwnRule
from offload_triforce.scheduler.states import DeviceStates, HiddenStates
from offload_triforce.scheduler.store import Leaving

Progress = Callable[[int, int], None]


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
LayerDone = Callable[[int, LayerPart], "Leaving | None"]
# Told which tokens are through all layers, and their hidden states [n, width], before the decoder's last norm.
TokensDone = Callable[[range, Tensor], None]


class _LayerView:
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

    def begin(self, index: int) -> None:
        """The next layer's turn."""
        self.index, self.length, self.queries, self.state, self.tail = index, 0, None, None, None

    def part(self) -> LayerPart:
        """What has become of the layer."""
        if self.state is not None:
            return RecurrentPart(self.state, self.tail)
        return AttentionPart(self._room[:, :, : self.length], self.queries, self.params)

    def convolve(self, convolution: ops.Convolution, own: OwnConvolution) -> Tensor:
        inputs, news = convolution.inputs, convolution.weight.shape[1] - 1
        if self.tail is None and self.before is not None:
            self.state, self.tail = self.before.load_state(self.index)
        if self.tail is None:  # a text begins with nothing, which is zero
            self.tail = inputs.new_zeros(news, inputs.shape[1])
        whole = torch.cat([self.tail, inputs])
        self.tail = whole[-news:].clone()
        return own(whole)[news:]

    def recur(self, _: ops.DeltaTokens, own: OwnRule) -> Tensor:
        output, state = own(self.state)
        self.state = state.float()
        return output

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: ops.AttentionParams) -> Tensor:
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
        self.length = self.before.held(params.window)
        if self.leaving is not None:
            self.leaving.wait(self.length)
        self.before.load(self.index, params.window, self._room[:, :, : self.length])


class _Call:
    """The arguments that the base model gave one layer for one chunk, hidden states apart."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    layout: ModelLayout,
    tokens: Tensor,
    chunk: int,
    queries: int,
    layer_done: LayerDone,
    progress: Progress | None = None,
    states: HiddenStates | None = None,
    before: Beginning | None = None,
    whole: int | None = None,
    tokens_done: TokensDone | None = None,
) -> None:
    """Compute the KV of ``tokens`` (n,), layer by layer. At least one more token must follow them.

    Args:
        model: with our attention attached. layout: of that model.
        chunk: tokens per step through one layer.
        queries: how many of the newest queries to hand on.
        layer_done: called once per layer, in order, with its number and what it has made of the text. The KV buffer is
            used again for the next layer: return the copies that are still reading it.
        progress: called with (steps done, steps in all).
        states: keeps the hidden states between two layers; on the device, if there is none.
        before: what the tokens follow. whole: tokens of the text that all of this is read for, if there are more.
        tokens_done: called for each chunk in the end, in order.
    """
    states, start = states or DeviceStates(chunk), 0 if before is None else before.length
    view, end = _LayerView(len(tokens), queries, before), start + len(tokens)
    try:
        stretch = Stretch(layout, tokens, start, whole or end)
        _read_layers(model, stretch, chunk, view, layer_done, progress, states, tokens_done)
    finally:
        states.end()


class Stretch(NamedTuple):
    """Tokens (n,) of a text of ``whole`` tokens, from position ``start`` on."""

    layout: ModelLayout
    tokens: Tensor
    start: int
    whole: int


def _read_layers(
    model: PreTrainedModel,
    stretch: Stretch,
    chunk: int,
    view: _LayerView,
    layer_done: LayerDone,
    progress: Progress | None,
    states: HiddenStates,
    tokens_done: TokensDone | None,
) -> None:
    layers = layers_of(model.get_decoder())
    count = len(stretch.tokens)
    parts = [slice(start, min(start + chunk, count)) for start in range(0, count, chunk)]
    calls: list[list[_Call]] = []
    for number, part in enumerate(parts):
        embedded, per_layer = _record(model, stretch, part)
        if not calls:
            states.begin(embedded, count)
        states.put(number, embedded)
        calls.append(per_layer)
    del embedded
    total, done = len(layers) * len(calls), 0
    for index, layer in enumerate(layers):
        view.begin(index)
        for number, per_layer in enumerate(calls):
            call = per_layer[index]
            made = layer(states.take(number), *call.args, **{**call.kwargs, "triforce": view})
            last = index + 1 == len(layers)
            states.put(number, made, keep=not last)
            if last and tokens_done is not None:
                first = stretch.start + parts[number].start
                tokens_done(range(first, first + made.shape[1]), made[0])
            done += 1
            if progress:
                progress(done, total)
        view.leaving = layer_done(index, view.part()) or view.leaving


def _record(model: PreTrainedModel, stretch: Stretch, part: slice) -> tuple[Tensor, list[_Call]]:
    """Embed one chunk: the first layer's input [1, T, hidden], and each layer's other arguments."""
    decoder = model.get_decoder()
    read, start = stretch.tokens[part], stretch.start
    positions = torch.arange(start + part.start, start + part.stop, device=model.device)
    if stretch.layout.longrope_switch is not None:
        # longrope takes its frequencies from the largest position of a call: let every chunk have the text's.
        read = torch.cat([read, read[:1]])
        positions = torch.cat([positions, positions.new_tensor([stretch.whole])])
    rows = embed(model, read)
    given = {"input_ids": read.to(model.device)[None]} if rows is None else {"inputs_embeds": rows[None]}
    states, calls = _run_recording(decoder, given, positions[None])
    length = part.stop - part.start
    if states.shape[1] == length:
        return states, calls
    return states[:, :length], [_Call(_shorten(c.args, length), _shorten(c.kwargs, length)) for c in calls]


def _run_recording(decoder: nn.Module, given: dict[str, Tensor], positions: Tensor) -> tuple[Tensor, list[_Call]]:
    """Run a decoder without its layers: what the first was given [1, T, hidden], and each layer's other arguments.

    Layers have another ``forward`` meanwhile. Calls of other threads go on to the one before; ours are known by their
    keyword. Afterwards they have what they had: accelerate sets one of its own.
    """
    layers, ours = layers_of(decoder), object()
    shares = getattr(decoder.config.get_text_config(), "num_kv_shared_layers", None) != 0
    before = [vars(layer).get("forward") for layer in layers]
    inputs: list[Tensor] = []
    calls: list[_Call] = []

    def recording(own: Callable[..., Any]) -> Callable[..., Any]:
        def recorder(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("triforce") is not ours:
                return own(*args, **kwargs)
            if not inputs:
                inputs.append(args[0])
            calls.append(_Call(args[1:], kwargs if shares else _without_others_kv(kwargs)))
            return args[0]

        return recorder

    def run() -> None:
        for layer in layers:
            layer.forward = recording(layer.forward)
        decoder(**given, position_ids=positions, use_cache=False, triforce=ours)

    def put_back() -> None:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = own

    do_and_undo(run, put_back)
    return inputs[0], calls


class _Forgetful(UserDict):
    """Where a layer may put its keys and values for later ones, when there is none that takes them."""

    def __setitem__(self, key: object, value: object) -> None:
        pass


def _without_others_kv(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a layer whose keys and values nobody else wants: kept, they would fill the device by and by."""
    return {name: _Forgetful() if isinstance(value, UserDict) else value for name, value in kwargs.items()}


def _shorten(value: Any, length: int) -> Any:
    """Cut everything that has one entry per token, [1, length + 1, ...], to ``length`` tokens."""
    if isinstance(value, Tensor):
        return value[:, :length] if value.dim() >= 2 and value.shape[1] == length + 1 else value
    if isinstance(value, (tuple, list)):
        return type(value)(_shorten(item, length) for item in value)
    if isinstance(value, dict):
        return {key: _shorten(item, length) for key, item in value.items()}
    return value
