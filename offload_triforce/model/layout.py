"""What a model's attention looks like from outside: found out by running a few tokens through it."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from offload_triforce.cache.sizes import RecurrentShape
from offload_triforce.errors import UnsupportedModelError, first_line
from offload_triforce.kernels.ops import AttentionParams, Convolution, DeltaTokens
from offload_triforce.model.adapter import ATTENTION_NAME, Attachment, DetachedError, run
from offload_triforce.model.layers import find_layers
from offload_triforce.model.outline import LayerShape, ModelLayout
from offload_triforce.model.recurrent import FAMILIES, redirect
from offload_triforce.model.refusals import refuse, rope_parameters
from offload_triforce.model.watch import (
    PROBE_NAME,
    PROBE_TOKENS,
    LayerWatch,
    MaskFunction,
    decoder_inputs,
    masks_asked_for,
    window_of,
)
from offload_triforce.model.windows import limiting_window

# What a layer was found to be, and where its tensors lie.
Seen = tuple[LayerShape | RecurrentShape, torch.dtype, torch.device]


class _Probe:
    """A view that writes down what it is asked and answers zeros. ``watch`` knows which layer runs."""

    def __init__(self, watch: LayerWatch) -> None:
        self.seen: dict[int, Seen] = {}
        self._watch = watch
        self._convolutions: dict[int, Convolution] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        if key.shape != value.shape or query.shape[-1] != key.shape[-1]:
            raise UnsupportedModelError("attention with values of another size than its keys (MLA) is not supported")
        if layer in self.seen:
            raise UnsupportedModelError(f"layer {layer} attends more than once per step, which is not supported")
        self.seen[layer] = LayerShape(key.shape[0], key.shape[2], params.window), key.dtype, key.device
        return torch.zeros_like(query)

    def convolve(self, convolution: Convolution, _: object) -> Tensor:
        if self._watch.current in self._convolutions:
            raise UnsupportedModelError(f"layer {self._watch.current} convolves more than once per step")
        self._convolutions[self._watch.current] = convolution
        return torch.zeros_like(convolution.inputs)

    def recur(self, tokens: DeltaTokens, _: object) -> Tensor:
        layer, (query, key, value, *_) = self._watch.current, tokens
        before = self._convolutions.get(layer)
        if before is None or layer in self.seen:
            raise UnsupportedModelError(f"layer {layer} keeps more than one recurrent state")
        if query.shape != key.shape or value.shape[1] % key.shape[1]:
            raise UnsupportedModelError(f"layer {layer} has a recurrent state whose queries do not fit its keys")
        channels, taps = before.weight.shape
        shape = RecurrentShape(key.shape[1], value.shape[1], key.shape[2], value.shape[2], channels, taps)
        self.seen[layer] = shape, before.inputs.dtype, value.device
        return torch.zeros_like(value)


class WeightsNeededError(Exception):
    """A model without weights (on the meta device) whose steps depend on what they compute."""


def probe(model: PreTrainedModel) -> ModelLayout:
    """Find the layout out, and refuse by name what this runtime cannot decode exactly.

    A model on the meta device will do: all that is looked at are shapes, apart from its masks.

    Raises:
        UnsupportedModelError: says which feature is the reason.
        WeightsNeededError: only for a model on the meta device.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    refuse(model.config, name)
    if model.get_output_embeddings() is None:
        raise UnsupportedModelError(f"{name} does not predict tokens; load it with AutoModelForCausalLM")
    layers = find_layers(model.get_decoder())
    if layers is None or len(layers) != config.num_hidden_layers:
        raise UnsupportedModelError(f"{name} does not keep its decoder layers in a list that the prefill can drive")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError(f"{name} counts positions by itself and cannot be told where a token stands")
    if config.model_type in FAMILIES:
        for layer in layers:
            redirect(layer)
    watch = LayerWatch(layers)
    view = _Probe(watch)
    try:
        vocabulary, masks = _one_step(model, view, watch)
    except DetachedError as error:
        raise UnsupportedModelError(
            f"{name} does not hand keywords down to its attention, so that cannot be told which cache to attend over"
        ) from error
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{name}: {error}") from error
    _refuse_missing(name, model, view)
    if watch.problem is not None:
        raise UnsupportedModelError(f"{name} {watch.problem}, so the prefill cannot drive them")
    _refuse_hidden_windows(name, config, view.seen)
    _refuse_other_masks(name, config, view.seen, masks)
    shapes, dtypes, devices = zip(*(view.seen[i] for i in sorted(view.seen)), strict=True)
    positions = getattr(config, "max_position_embeddings", None)
    layout = ModelLayout(shapes, dtypes[0], devices[0], vocabulary, positions, _longrope_switch(config))
    for kind, group in (("full-attention", layout.full), ("sliding-window", layout.sliding)):
        if len({(shapes[i].kv_heads, shapes[i].head_dim) for i in group}) > 1:
            raise UnsupportedModelError(f"the {kind} layers of {name} differ in their KV heads or head dimension")
    if len({shapes[i] for i in layout.recurrent}) > 1:
        raise UnsupportedModelError(f"the recurrent layers of {name} differ in the size of their state")
    if not layout.attention:
        raise UnsupportedModelError(f"{name} has no attention layers, and so no KV cache to offload")
    if len(set(devices)) > 1:
        raise UnsupportedModelError(f"{name} is spread over {len(set(devices))} devices; load it onto one")
    return layout


def _one_step(model: PreTrainedModel, view: _Probe, watch: LayerWatch) -> tuple[int, list[MaskFunction]]:
    """Run some tokens through: the number of logits, and the masks that the model would build.

    On the meta device none are asked for: transformers looks into position_ids for them.
    """
    blank = model.device.type == "meta"
    attachment = Attachment(model, name=ATTENTION_NAME if blank else PROBE_NAME)
    try:
        return attachment.call(partial(_look_on, model, view, watch, blank))
    except (UnsupportedModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a model that nobody has tried may raise
        if blank and isinstance(error, (RuntimeError, NotImplementedError)):
            raise WeightsNeededError from error
        # What Python itself says of an attribute or an operand says nothing to users.
        why = "" if isinstance(error, (AttributeError, TypeError)) else f" ({first_line(error)})"
        raise UnsupportedModelError(f"it does not run through the transformers attention registry{why}") from error


@torch.no_grad()
def _look_on(model: PreTrainedModel, view: _Probe, watch: LayerWatch, blank: bool) -> tuple[int, list[MaskFunction]]:
    with masks_asked_for() as masks:
        with watch.looking():
            # All logits: where layers share keys and values, transformers runs the later ones for what is kept alone.
            vocabulary = run(model, range(PROBE_TOKENS), range(PROBE_TOKENS), view, keep=PROBE_TOKENS).shape[-1]
        if not blank and not _same(watch.inputs, decoder_inputs(model)):
            raise UnsupportedModelError("its decoder alone does not read tokens as the whole model does")
    return vocabulary, masks


def _same(these: list[Tensor], those: list[Tensor]) -> bool:
    return len(these) == len(those) and all(map(torch.equal, these, those))


def _refuse_missing(name: str, model: PreTrainedModel, view: _Probe) -> None:
    """Every layer has to have handed its keys and values on."""
    count = model.config.get_text_config().num_hidden_layers
    missing = sorted(set(range(count)) - set(view.seen))
    if len(view.seen) + len(missing) > count:
        raise UnsupportedModelError(f"{name} does not number its {count} layers of attention from 0 to {count - 1}")
    if len(missing) == count:
        raise UnsupportedModelError(
            f"{name} computes its attention by itself and not through the transformers attention registry"
        )
    if missing:
        raise UnsupportedModelError(
            f"{len(missing)} of {count} layers of {name} keep a state other than keys and values (the first is layer "
            f"{missing[0]}); only attention layers are supported"
        )


def _refuse_hidden_windows(name: str, config: Any, seen: dict[int, Seen]) -> None:
    """Some models put their window (or chunking) into the mask alone, which is not built here."""
    types = getattr(config, "layer_types", None)
    if types is None:
        slides = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
        types = ["sliding_attention" if slides else "full_attention"] * config.num_hidden_layers
    for layer, kind in enumerate(types):
        if isinstance(seen[layer][0], RecurrentShape):
            continue
        expected = limiting_window(config.sliding_window, config) if kind == "sliding_attention" else None
        if seen[layer][0].window != expected:
            raise UnsupportedModelError(
                f"{name} does not tell its attention function about the sliding window of layer {layer}; such models "
                "are not supported"
            )


def _refuse_other_masks(name: str, config: Any, seen: dict[int, Seen], masks: list[MaskFunction]) -> None:
    """What the masks say must be what the layers said: causal, or a sliding window of theirs."""
    told = {layer.window for layer, _, _ in seen.values() if isinstance(layer, LayerShape)}
    known = {None, getattr(config, "sliding_window", None), *told}
    try:
        found = {limiting_window(window_of(mask, known), config) for mask in masks}
    except ValueError as error:
        raise UnsupportedModelError(
            f"{name} masks its attention by a rule of its own, which is neither causal nor a sliding window that its "
            "layers tell of"
        ) from error
    # Where the configuration names a kind for each layer, some models build masks of kinds that no layer has.
    if masks and found != told and getattr(config, "layer_types", None) is None:
        raise UnsupportedModelError(f"{name} has a sliding window in its mask that its attention function is not told")


def _longrope_switch(config: Any) -> int | None:
    for parameters in rope_parameters(config):
        if parameters.get("rope_type") == "longrope":
            fallback = getattr(config, "original_max_position_embeddings", None)
            return parameters.get("original_max_position_embeddings") or fallback
    return None
