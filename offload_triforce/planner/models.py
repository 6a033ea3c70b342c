"""What is planned for: a model of the table of names, or whatever else has a configuration."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from offload_triforce.errors import InputError, first_line
from offload_triforce.machine.hardware import Machine
from offload_triforce.model.fetch import kept_file, looks_like_path
from offload_triforce.model.hub import access, is_here, require
from offload_triforce.model.names import find_known, nearest
from offload_triforce.model.outline import ModelShape, shape_of_known

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def find_shape(source: str, dtype: torch.dtype = torch.bfloat16) -> ModelShape:
    """The shape of a local folder, config.json or GGUF file, of a model of the table, or of one on the hub.

    Raises:
        InputError: nothing of that name, with the nearest names of the table.
        UnsupportedModelError: a model that this runtime does not decode.
    """
    path = Path(os.path.expanduser(source))
    if is_here(source):
        return _read(source, path, dtype)
    known = find_known(source)
    if known is not None:
        return replace(shape_of_known(known, dtype), gguf=kept_file(known))
    if looks_like_path(source):
        raise InputError(f"no such file or folder: {source}")
    require(source)
    return _shape(_from_hub(source), dtype, source)


def on_card(shape: ModelShape, machine: Machine) -> ModelShape:
    """The shape with its weights as they will lie on that machine's card: as in the files, or written out."""
    if shape.packed is None:
        return shape
    from offload_triforce.model.prequantized import stays_packed

    return shape.packed_as_in_files() if stays_packed(shape.packed, machine.speeds.cc) else shape


def _shape(config: PretrainedConfig, dtype: torch.dtype, name: str, gguf: Path | None = None) -> ModelShape:
    from offload_triforce.model.prequantized import check_known
    from offload_triforce.model.shape import shape_of

    packed = None if gguf is not None else check_known(config, name)  # transformers says so of GGUF files as well
    return replace(shape_of(config, dtype, name=name), gguf=gguf, packed=packed)


def _read(source: str, path: Path, dtype: torch.dtype) -> ModelShape:
    from transformers import AutoConfig

    from offload_triforce.model.file_sizes import counts_in_files
    from offload_triforce.model.gguf_header import read_header
    from offload_triforce.model.gguf_skim import skimming
    from offload_triforce.model.local_files import lone_gguf
    from offload_triforce.model.mtp_files import lacks_head

    gguf = path if path.suffix == ".gguf" else None
    if path.is_dir():
        gguf = None if (path / "config.json").exists() else lone_gguf(source, path)
    if gguf is not None:
        read_header(gguf)  # says what is wrong with a file that is not whole
    try:
        with skimming():
            if gguf is not None:
                config = AutoConfig.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
            else:
                config = AutoConfig.from_pretrained(str(path))
    except Exception as error:  # whatever a file that somebody wrote makes of transformers
        raise InputError(f"{source} holds no configuration that transformers can read: {first_line(error)}") from error
    shape = _shape(config, dtype, path.name or source, gguf)
    if shape.packed is not None and path.is_dir():
        shape = replace(shape, packed_counts=counts_in_files(path, shape.counts, dtype.itemsize))
    if shape.mtp is not None and path.is_dir() and lacks_head(config, str(path)):
        return replace(shape, mtp=None)
    return shape


def _from_hub(source: str) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        with access(source):
            return AutoConfig.from_pretrained(source)
    except Exception as error:  # whatever the reason, the table's nearest names are the answer
        raise InputError(
            f"{source!r} is no model whose configuration the hub gives out from here ({first_line(error)}); "
            f"{nearest(source)}"
        ) from error
