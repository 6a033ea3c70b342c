"""The MTP head that a checkpoint brings along: found in its files, and loaded through transformers' ``MtpModel``.

transformers ignores such weights in loading the model itself. Whether they are there is asked before anything is read.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from offload_triforce.errors import InputError, MemoryLimitError, UnsupportedModelError, first_line
from offload_triforce.model.hub import access
from offload_triforce.model.local_files import locate
from offload_triforce.model.mtp import INSTEAD, MtpHead

# The first release whose MtpModel reads the checkpoints that we know.
RELEASE = "5.24"
# Where configurations say how many layers of their own kind such heads have.
_COUNTS = ("num_mtp_layers", "mtp_num_hidden_layers", "num_nextn_predict_layers")
# What a head's weights are called: ``mtp.`` comes before, or they are of layers behind the model's last one.
_LAYER = re.compile(r"(^|\.)layers\.(\d+)\.")
# What beside a weight says that it is packed, in files of AWQ, GPTQ, compressed tensors, FP8 and bitsandbytes.
_PACKED = re.compile(r"\.(qweight|qzeros|scales|weight_packed|weight_scale\w*|absmax|quant_state\S*|SCB)$")
_IGNORED = "_keys_to_ignore_on_load_unexpected"

_loading = threading.Lock()
_loaded: weakref.WeakKeyDictionary[PreTrainedModel, PreTrainedModel] = weakref.WeakKeyDictionary()


def head_layers(config: PretrainedConfig) -> int:
    """How many layers a configuration says that the model's MTP head has; 0 if it has none."""
    text = config.get_text_config()
    return next((count for name in _COUNTS if (count := getattr(text, name, None))), 0)


def blank_head(model: PreTrainedModel) -> nn.Module | None:
    """The layers of the head that a configuration tells of, for a model on the meta device; None if none can be had."""
    try:
        with torch.device("meta"):
            return new_head(model).layers
    except UnsupportedModelError:
        return None


def new_head(model: PreTrainedModel) -> PreTrainedModel:
    """A head that has learned nothing yet, with the model's own embeddings.

    Raises:
        UnsupportedModelError: as ``load_head``.
    """
    kind = _mtp_model()
    _check_config(model.config, type(model).__name__)
    _check_decoder(model)
    with _described(model):
        return kind(model, 1)


def lacks_head(config: PretrainedConfig, source: str) -> bool:
    """Whether a model's files are there and hold no head that could be read, whatever the configuration says."""
    try:
        _names_in(source)
    except OSError:
        return False
    try:
        _check_weights(config, source)
    except InputError:
        return True
    return False


def check_head(source: str) -> None:
    """Refuse a model without a head before its weights are read. ``source``: as ``load_model`` finds it.

    Raises:
        UnsupportedModelError, InputError: as ``load_head``.
    """
    folder, gguf = locate(source)
    _mtp_model()
    if gguf:
        raise InputError(f"{gguf} is a GGUF file, of which transformers reads no MTP head; {INSTEAD}")
    try:
        with access(folder):
            config = AutoConfig.from_pretrained(folder)
    except Exception:  # whatever it is: ``load_model`` explains it
        return
    with access(folder):
        _check_config(config, source)
        _check_weights(config, folder)


def load_head(model: PreTrainedModel) -> MtpHead:
    """The MTP head of a loaded model, from the files that the model came from, onto its device.

    It is read once for all engines of that model, and lives as long as the model.

    Raises:
        UnsupportedModelError: this release of transformers, or this model, has none that can be run.
        InputError: the files do not hold its weights, or not all of them. MemoryLimitError: they do not fit.
    """
    with _loading:
        if model not in _loaded:
            _loaded[model] = _load(model)
    return MtpHead(model, _loaded[model])  # outside: it waits for the model


def forget_head(model: PreTrainedModel) -> None:
    """Let the head of a model go, as soon as nobody uses it any more."""
    with _loading:
        _loaded.pop(model, None)


def _load(model: PreTrainedModel) -> PreTrainedModel:
    source, kind = model.config.name_or_path, _mtp_model()
    _check_config(model.config, type(model).__name__)
    _check_decoder(model)
    if not source:
        raise InputError(f"a model that was not loaded from files brings no MTP head along; {INSTEAD}")
    with access(source), _described(model):
        _check_weights(model.config, source)
        return _read(kind, model, source).eval()


def _mtp_model() -> Any:
    """transformers' own class.

    Raises:
        UnsupportedModelError: it has none, or one that reads too few checkpoints.
    """
    from transformers import modeling_layers

    kind = getattr(modeling_layers, "MtpModel", None)
    if not hasattr(kind, "get_weight_conversions"):
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} does not read MTP heads; install transformers {RELEASE} or "
            f"later, or {INSTEAD}"
        )
    return kind


def _check_config(config: PretrainedConfig, name: str) -> None:
    layers = head_layers(config)
    if not layers:
        raise UnsupportedModelError(f"{name} has no MTP head that its configuration tells of; {INSTEAD}")
    if layers > 1:
        raise UnsupportedModelError(
            f"the MTP head of {name} has {layers} layers; only one layer, which is fed on with what it makes, is "
            f"supported; {INSTEAD}"
        )


def _check_decoder(model: PreTrainedModel) -> None:
    decoder, name = model.get_decoder(), type(model).__name__
    if not isinstance(getattr(decoder, "norm", None), nn.Module) or not hasattr(model, "lm_head"):
        raise UnsupportedModelError(
            f"{name} does not keep its last norm and its output embedding where its MTP head could find them; {INSTEAD}"
        )
    first = next((type(part) for n, part in decoder.layers[-1].named_modules() if "norm" in n), None)
    if first is not type(decoder.norm):  # what MtpModel takes for the head's own norms
        raise UnsupportedModelError(
            f"transformers cannot make the MTP head of {name}: its last layer's first norm is a "
            f"{first and first.__name__}, and its decoder ends with a {type(decoder.norm).__name__}; {INSTEAD}"
        )


def _check_weights(config: PretrainedConfig, source: str) -> None:
    """Whether the files hold a head's weights at all, and not packed ones."""
    try:
        names = _names_in(source)
    except OSError as error:
        raise InputError(
            f"{source} holds no safetensors files, where an MTP head would be read from; {INSTEAD}"
        ) from error
    layers = config.get_text_config().num_hidden_layers
    own = [name for name in names if _is_of_head(name, layers)]
    if not own:
        raise InputError(
            f"the files of {source} hold no weights of an MTP head, though its configuration tells of one; get a "
            f"checkpoint that has them, or {INSTEAD}"
        )
    packed = [name for name in own if _PACKED.search(name)]
    if packed:
        raise InputError(
            f"the MTP head of {source} is quantised ({packed[0]}), and only one in 16 or 32 bits can be read; get a "
            f"checkpoint that has it so, or {INSTEAD}"
        )


def _is_of_head(name: str, layers: int) -> bool:
    """Whether a weight of that name is of the head of a model of so many layers."""
    numbered = _LAYER.search(name)
    return ".mtp." in f".{name}" or (numbered is not None and int(numbered[2]) >= layers)


def _names_in(source: str) -> list[str]:
    """The names of all weights in a model's safetensors files.

    Raises:
        OSError: there are none.
    """
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    index = cached_file(source, "model.safetensors.index.json", **quiet)
    if index is not None:
        return list(json.loads(Path(index).read_text())["weight_map"])
    whole = cached_file(source, "model.safetensors", **quiet)
    if whole is None:
        raise OSError("no model.safetensors")
    with safe_open(whole, framework="pt") as file:
        return list(file.keys())


def _read(kind: Any, model: PreTrainedModel, source: str) -> PreTrainedModel:
    try:
        module = kind.from_pretrained(model, device_map={"": model.device})
    except torch.OutOfMemoryError as error:
        raise MemoryLimitError(f"the MTP head of {source} does not fit on {model.device}; {INSTEAD}") from error
    except Exception as error:  # whatever files that somebody wrote make of transformers
        raise InputError(
            f"the MTP head of {source} could not be loaded: {_shortened(first_line(error))}; get the files again, or "
            f"{INSTEAD}"
        ) from error
    lost = [name for name, weight in module.layers.named_parameters() if weight.device != model.device]
    if lost:
        raise InputError(
            f"{len(lost)} weights of the MTP head of {source}, such as {lost[0]}, have not the shapes that its "
            f"configuration asks for; get configuration and weights from one place, or {INSTEAD}"
        )
    return module


def _shortened(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most].rpartition(' ')[0]} ..."


@contextlib.contextmanager
def _described(model: PreTrainedModel) -> Iterator[None]:
    """While this lasts, a configuration says of its head what ``MtpModel`` asks for, where the family's own does not.

    Qwen3.5 and its kin say ``mtp_num_hidden_layers`` alone: one layer, which attends to everything. And what the model
    ignores in loading, which is what ``MtpModel`` looks for, is the head alone: no image tower, no other size.
    """
    text = model.config.get_text_config()
    told: dict[str, Any] = {"num_mtp_layers": 1}
    if getattr(text, "layer_types", None) is not None:
        told["mtp_layer_types"] = ["full_attention"]
    if getattr(text, "mlp_layer_types", None) is not None:
        told["mtp_mlp_layer_types"] = [text.mlp_layer_types[-1]]
    added = [name for name in told if getattr(text, name, None) is None]
    patterns = [r"(^|\.)mtp\.", rf"(^|\.)layers\.{text.num_hidden_layers}\."]
    try:
        for name in added:
            setattr(text, name, told[name])
        setattr(model, _IGNORED, patterns)
        yield
    finally:
        for name in added:
            with contextlib.suppress(AttributeError):
                delattr(text, name)
        vars(model).pop(_IGNORED, None)
