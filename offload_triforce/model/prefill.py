"""Layer-major prefill: all chunks of the prompt through one layer, then the next.

Only one layer's KV is on the device at a time. Host traffic is one copy of each layer's KV from the device to the
host and nothing back, but for the hidden states where they wait in host memory. No family-specific code: the base
model is run once per chunk with every layer replaced by an identity that records its arguments, and the layers are then
replayed in their own order.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from offload_triforce.kernels import ops
from offload_triforce.model.embeddings import embed
from offload_triforce.model.layout import ModelLayout
from offload_triforce.model.lock import do_and_undo
from offload_triforce.model.recurrent import OwnConvolution, OwnRule
from offload_triforce.scheduler.states import DeviceStates, HiddenStates
from offload_triforce.scheduler.store import Leaving

Progress = Callable[[int, int], None]


class AttentionPart(NamedTuple):
    """What a layer that attends makes of a text: ``kv`` [2, K, n, D], the newest ``queries`` [H, m, D], ``params``."""

    kv: Tensor
    queries: Tensor
    params: ops.AttentionParams


class RecurrentPart(NamedTuple):
    """What a recurrent layer makes of it: ``state`` [Hv, Dk, Dv], the newest inputs of its convolution [W - 1, C]."""

    state: Tensor
    tail: Tensor


LayerPart = AttentionPart | RecurrentPart
LayerDone = Callable[[int, LayerPart], "Leaving | None"]


class _LayerView:
    """What the layer that is being filled makes of the text: its KV, [2, K, n, D], and last queries; or its state."""

    def __init__(self, tokens: int, queries: int) -> None:
        self.tokens, self.keep_queries = tokens, queries
        self.kv: Tensor | None = None
        self.length = 0
        self.queries: Tensor | None = None
        self.params = ops.AttentionParams(1.0)
        self.leaving: Leaving | None = None  # copies of an earlier layer, which share the buffer
        self.state: Tensor | None = None
        self.tail: Tensor | None = None

    def begin(self) -> None:
        """The next layer's turn."""
        self.length, self.queries, self.state, self.tail = 0, None, None, None

    def part(self) -> LayerPart:
        """What has become of the layer."""
        if self.state is not None:
            return RecurrentPart(self.state, self.tail)
        return AttentionPart(self.kv, self.queries, self.params)

    def convolve(self, convolution: ops.Convolution, own: OwnConvolution) -> Tensor:
        inputs, news = convolution.inputs, convolution.weight.shape[1] - 1
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
        if self.kv is None or self.kv.shape[1] != key.shape[0] or self.kv.shape[3] != key.shape[2]:
            self.kv = key.new_empty(2, key.shape[0], self.tokens, key.shape[2])
        end = self.length + key.shape[1]
        if self.leaving is not None:
            self.leaving.wait(end)
        self.kv[0, :, self.length : end], self.kv[1, :, self.length : end] = key, value
        self.length, self.params = end, params
        newest = query[:, -self.keep_queries :]
        if self.queries is not None and newest.shape[1] < self.keep_queries:  # a short last chunk
            newest = torch.cat([self.queries, newest], dim=1)[:, -self.keep_queries :]
        self.queries = newest
        return ops.prefill_attention(query, self.kv[0, :, :end], self.kv[1, :, :end], params)


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
    """
    states = states or DeviceStates(chunk)
    try:
        _read_layers(model, layout, tokens, chunk, _LayerView(len(tokens), queries), layer_done, progress, states)
    finally:
        states.end()


def _read_layers(
    model: PreTrainedModel,
    layout: ModelLayout,
    tokens: Tensor,
    chunk: int,
    view: _LayerView,
    layer_done: LayerDone,
    progress: Progress | None,
    states: HiddenStates,
) -> None:
    layers = model.get_decoder().layers
    parts = [slice(start, min(start + chunk, len(tokens))) for start in range(0, len(tokens), chunk)]
    calls: list[list[_Call]] = []
    for number, part in enumerate(parts):
        embedded, per_layer = _record(model, layout, tokens, part)
        if not calls:
            states.begin(embedded, len(tokens))
        states.put(number, embedded)
        calls.append(per_layer)
    del embedded
    total, done = len(layers) * len(calls), 0
    for index, layer in enumerate(layers):
        view.begin()
        for number, per_layer in enumerate(calls):
            call = per_layer[index]
            made = layer(states.take(number), *call.args, **{**call.kwargs, "triforce": view})
            states.put(number, made, keep=index + 1 < len(layers))
            done += 1
            if progress:
                progress(done, total)
        view.leaving = layer_done(index, view.part()) or view.leaving


def _record(model: PreTrainedModel, layout: ModelLayout, tokens: Tensor, part: slice) -> tuple[Tensor, list[_Call]]:
    """Embed one chunk: the first layer's input [1, T, hidden], and each layer's other arguments."""
    decoder = model.get_decoder()
    read = tokens[part]
    positions = torch.arange(part.start, part.stop, device=model.device)
    if layout.longrope_switch is not None:
        # longrope takes its frequencies from the largest position of a call: let every chunk have the text's.
        read = torch.cat([read, read[:1]])
        positions = torch.cat([positions, positions.new_tensor([len(tokens)])])
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
    layers, ours = decoder.layers, object()
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
