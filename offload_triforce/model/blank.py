"""A model without weights, made from its configuration: what loading it would give is known before anything is read."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from offload_triforce.errors import InputError, UnsupportedModelError, first_line
from offload_triforce.model.layout import ModelLayout, WeightsNeededError, probe
from offload_triforce.model.multimodal import loaded_config
from offload_triforce.model.refusals import class_name, refuse_unloadable
from offload_triforce.model.text_part import maker


def layout_of(config: PretrainedConfig, dtype: torch.dtype) -> ModelLayout:
    """What ``probe`` finds in the loaded model, from its configuration alone; refuses the same, in the same words.

    Raises:
        UnsupportedModelError: says which feature is the reason.
        InputError: a configuration that does not make a model.
    """
    return probe_blank(blank_model(config, dtype))


def blank_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model that ``load_model`` would load, on a device without memory.

    Raises:
        UnsupportedModelError: the configuration says that it is not decoded.
        InputError: a configuration that does not make a model.
    """
    config = loaded_config(config)
    refuse_unloadable(config)
    try:
        with torch.device("meta"):
            # Experts chosen by indexing: other ways ask on the host how many tokens each of them has.
            model = maker(config).from_config(config, dtype=dtype, experts_implementation="batched_mm")
            return model.eval()
    except UnsupportedModelError:
        raise
    except Exception as error:  # a file may hold anything, and each family checks it in its own way
        why = "" if "NoneType" in str(error) else f": {first_line(error)}"  # what Python says of it tells users nothing
        raise InputError(f"the configuration makes no {class_name(config)}{why}") from error


def probe_blank(model: PreTrainedModel) -> ModelLayout:
    """``probe`` for a model on the meta device.

    Raises:
        UnsupportedModelError: says which feature is the reason.
    """
    try:
        return probe(model)
    except WeightsNeededError:
        _give_zeros(model)
        return replace(probe(model), device=torch.device("meta"))


def _give_zeros(model: PreTrainedModel) -> None:
    """Weights that are all zero and take no memory: one element, seen in the shape of each weight."""
    zeros: dict[int, Tensor] = {}  # tied weights stay tied
    for part in model.modules():
        for held in (part._parameters, part._buffers):
            for name, weight in held.items():
                if weight is None:
                    continue
                if id(weight) not in zeros:
                    zero = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
                    is_weight = isinstance(weight, nn.Parameter)
                    zeros[id(weight)] = nn.Parameter(zero, requires_grad=False) if is_weight else zero
                held[name] = zeros[id(weight)]
