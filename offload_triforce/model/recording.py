"""What a base model gives its layers, layer by layer: recorded while each is replaced by an identity."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from offload_triforce.model.embeddings import embed
from offload_triforce.model.layers import layers_of
from offload_triforce.model.layout import ModelLayout
from offload_triforce.model.lock import do_and_undo


class Call:
    """The arguments that the base model gave one layer for one chunk, hidden states apart."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs


class Stretch(NamedTuple):
    """Tokens (n,) of a text of ``whole`` tokens, from position ``start`` on."""

    layout: ModelLayout
    tokens: Tensor
    start: int
    whole: int


def record(model: PreTrainedModel, stretch: Stretch, part: slice) -> tuple[Tensor, list[Call]]:
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
    return states[:, :length], [Call(_shorten(c.args, length), _shorten(c.kwargs, length)) for c in calls]


def _run_recording(decoder: nn.Module, given: dict[str, Tensor], positions: Tensor) -> tuple[Tensor, list[Call]]:
    """Run a decoder without its layers: what the first was given [1, T, hidden], and each layer's other arguments.

    Layers have another ``forward`` meanwhile. Calls of other threads go on to the one before; ours are known by their
    keyword. Afterwards they have what they had: accelerate sets one of its own.
    """
    layers, ours = layers_of(decoder), object()
    shares = getattr(decoder.config.get_text_config(), "num_kv_shared_layers", None) != 0
    before = [vars(layer).get("forward") for layer in layers]
    inputs: list[Tensor] = []
    calls: list[Call] = []

    def recording(own: Callable[..., Any]) -> Callable[..., Any]:
        def recorder(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("triforce") is not ours:
                return own(*args, **kwargs)
            if not inputs:
                inputs.append(args[0])
            calls.append(Call(args[1:], kwargs if shares else _without_others_kv(kwargs)))
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


def handed_on(calls: Sequence[Call], make: bool = False) -> Any:
    """What layers have put down for later ones in one chunk: keys and values by name, in host memory.

    ``make``: where they put it, instead; there must be such a place.
    """
    places = (v for call in calls for v in call.kwargs.values() if isinstance(v, UserDict))
    place = next((place for place in places if not isinstance(place, _Forgetful)), None)
    if make or place is None:
        return place if make else {}
    return {name: tuple(tensor.to("cpu", copy=True) for tensor in pair) for name, pair in place.items()}
