"""Models that see or hear as well, made by their own class, but without what they see and hear with.

How such a model reads a text (its positions, its masks, what it does to embeddings) is in the code of the whole model,
and that runs as it is. Modules that no token of a text comes through are taken off before any weights are read; of the
files, their weights are then passed over. What the whole model does with a text by other means than these is found out
by the check of families that nobody tried (``runtime/self_check.py``).
"""

from __future__ import annotations

import functools
import re
import weakref
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

from offload_triforce.errors import InputError, UnsupportedModelError


def other_parts(config: PretrainedConfig) -> list[str]:
    """What a configuration describes beside its text decoder: ``vision``, ``audio``."""
    text = config.get_text_config()
    described = [name for name in config.sub_configs if isinstance(getattr(config, name, None), PretrainedConfig)]
    return [name.removesuffix("_config") for name in described if getattr(config, name) is not text]


def maker(config: PretrainedConfig) -> Any:
    """What makes the model of a configuration, by ``from_pretrained`` or ``from_config``: without other parts."""
    kind = type(config)
    if kind not in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return AutoModelForCausalLM
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return _text_part_of(MODEL_FOR_MULTIMODAL_LM_MAPPING[kind])
    # Of some families that is the text decoder alone, whose class has that one's settings.
    whole = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    return _text_part_of(whole) if whole.config_class is kind else AutoModelForCausalLM


@functools.cache
def _text_part_of(whole: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of such models. It has the name of the whole one's: transformers goes by it in reading weights."""

    def __init__(self: PreTrainedModel, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        whole.__init__(self, config, *args, **kwargs)
        leave_out(self)

    def from_config(kind: type[PreTrainedModel], config: PretrainedConfig, **options: Any) -> PreTrainedModel:
        return kind._from_config(config, **options)

    own = {"__init__": __init__, "__module__": whole.__module__, "from_config": classmethod(from_config)}
    return type(whole.__name__, (whole,), own)


class LeftOut(nn.Module):
    """What stands where a part was: without weights, and where the rest of the model is. Images end here."""

    def __init__(self, model: PreTrainedModel, part: str) -> None:
        super().__init__()
        self.part, self._model = part, weakref.ref(model)

    @property
    def device(self) -> torch.device:
        """As a part that is there would say; some models ask even where there is a text alone."""
        return self._model().device

    @property
    def dtype(self) -> torch.dtype:
        """The same."""
        return self._model().dtype

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Refuse.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"only the text decoder of {type(self._model()).__name__} is loaded, without {self.part}; pass text alone"
        )


def leave_out(model: PreTrainedModel) -> None:
    """Take off what belongs neither to the decoder nor to embeddings; inside of these, models of other parts.

    Raises:
        UnsupportedModelError: it does not say where its text decoder is.
    """
    try:
        text = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    except (AttributeError, NotImplementedError):
        text = (None,)
    if not isinstance(text[0], nn.Module):
        raise UnsupportedModelError(f"{type(model).__name__} does not say where its text decoder is")
    kept = {id(part) for top in text if top is not None for part in top.modules()}
    others = {type(getattr(model.config, f"{part}_config")) for part in other_parts(model.config)}
    model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ())
    _leave_out(model, model, kept, tuple(others - {type(model.config.get_text_config())}))


def _leave_out(model: PreTrainedModel, module: nn.Module, kept: set[int], others: tuple[type, ...]) -> None:
    for name, part in list(module.named_children()):
        of_another = isinstance(part, PreTrainedModel) and isinstance(part.config, others)
        if of_another or not any(id(inner) in kept for inner in part.modules()):
            setattr(module, name, LeftOut(model, name))
            # Else transformers lists all weights that it passes over.
            model._keys_to_ignore_on_load_unexpected.add(rf"(^|\.){re.escape(name)}\.")
        else:
            _leave_out(model, part, kept, others)
