"""Layer-major prefill: all chunks of the prompt through one layer, then the next.

Only one layer's KV is on the device at a time. Host traffic is one copy of each layer's KV from the device to the
host and nothing back. No family-specific code: the base model is run once per chunk with every layer replaced
by an identity that records its arguments, and the layers are then replayed in their own order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from offload_triforce.kernels import ops
from offload_triforce.model.layout import ModelLayout
from offload_triforce.model.lock import do_and_undo
from offload_triforce.scheduler.store import Leaving

Progress = Callable[[int, int], None]
LayerDone = Callable[[int, Tensor, Tensor, ops.AttentionParams], "Leaving | None"]


class _LayerView:
    """The KV of the layer that is being filled, [2, K, n, D], and its last queries."""

    def __init__(self, tokens: int, queries: int) -> None:
        self.tokens, self.keep_queries = tokens, queries
        self.kv: Tensor | None = None
        self.length = 0
        self.queries: Tensor | None = None
        self.params = ops.AttentionParams(1.0)
        self.leaving: Leaving | None = None  # copies of the layer before, which share the buffer

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
) -> None:
    """Compute the KV of ``tokens`` (n,), layer by layer. At least one more token must follow them.

    Args:
        model: with our attention attached. layout: of that model.
        chunk: tokens per step through one layer.
        queries: how many of the newest queries to hand on.
        layer_done: called once per layer, in order, with (layer, KV [2, K, n, D], newest queries [H, m, D],
            rule). The KV buffer is used again for the next layer: return the copies that are still reading it.
        progress: called with (steps done, steps in all).
    """
    layers = model.get_decoder().layers
    parts = [slice(start, min(start + chunk, len(tokens))) for start in range(0, len(tokens), chunk)]
    # One tensor for all chunks: of many, torch's allocator would waste what is left over in each of its segments.
    hidden = torch.empty(0)
    calls: list[list[_Call]] = []
    for part in parts:
        states, per_layer = _record(model, layout, tokens, part)
        if not calls:
            hidden = states.new_empty(1, len(tokens), states.shape[2])
        hidden[:, part] = states
        calls.append(per_layer)
    total, done = len(layers) * len(calls), 0
    view = _LayerView(len(tokens), queries)
    for index, layer in enumerate(layers):
        view.length, view.queries = 0, None
        for part, per_layer in zip(parts, calls, strict=True):
            call = per_layer[index]
            hidden[:, part] = layer(hidden[:, part], *call.args, **{**call.kwargs, "triforce": view})
            done += 1
            if progress:
                progress(done, total)
        view.leaving = layer_done(index, view.kv, view.queries, view.params)


def _record(model: PreTrainedModel, layout: ModelLayout, tokens: Tensor, part: slice) -> tuple[Tensor, list[_Call]]:
    """Embed one chunk: the first layer's input [1, T, hidden], and each layer's other arguments."""
    decoder = model.get_decoder()
    ids = tokens[part].to(model.device)
    positions = torch.arange(part.start, part.stop, device=ids.device)
    if layout.longrope_switch is not None:
        # longrope takes its frequencies from the largest position of a call: let every chunk have the text's.
        ids = torch.cat([ids, ids[:1]])
        positions = torch.cat([positions, positions.new_tensor([len(tokens)])])
    states, calls = _run_recording(decoder, ids[None], positions[None])
    length = part.stop - part.start
    if states.shape[1] == length:
        return states, calls
    return states[:, :length], [_Call(_shorten(c.args, length), _shorten(c.kwargs, length)) for c in calls]


def _run_recording(decoder: nn.Module, ids: Tensor, positions: Tensor) -> tuple[Tensor, list[_Call]]:
    """Run a decoder without its layers: what the first was given [1, T, hidden], and each layer's other arguments.

    Layers have another ``forward`` meanwhile. Calls of other threads go on to the one before; ours are known by their
    keyword. Afterwards they have what they had: accelerate sets one of its own.
    """
    layers, ours = decoder.layers, object()
    before = [vars(layer).get("forward") for layer in layers]
    inputs: list[Tensor] = []
    calls: list[_Call] = []

    def recording(own: Callable[..., Any]) -> Callable[..., Any]:
        def recorder(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("triforce") is not ours:
                return own(*args, **kwargs)
            if not inputs:
                inputs.append(args[0])
            calls.append(_Call(args[1:], kwargs))
            return args[0]

        return recorder

    def run() -> None:
        for layer in layers:
            layer.forward = recording(layer.forward)
        decoder(input_ids=ids, position_ids=positions, use_cache=False, triforce=ours)

    def put_back() -> None:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = own

    do_and_undo(run, put_back)
    return inputs[0], calls


def _shorten(value: Any, length: int) -> Any:
    """Cut everything that has one entry per token, [1, length + 1, ...], to ``length`` tokens."""
    if isinstance(value, Tensor):
        return value[:, :length] if value.dim() >= 2 and value.shape[1] == length + 1 else value
    if isinstance(value, (tuple, list)):
        return type(value)(_shorten(item, length) for item in value)
    if isinstance(value, dict):
        return {key: _shorten(item, length) for key, item in value.items()}
    return value
