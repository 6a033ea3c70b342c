"""What a path means, and whether a folder is whole: its JSON files, its weights by their headers and their index.

Looked at before transformers does: what it says of a download that broke off need not name the file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from offload_triforce.errors import InputError
from offload_triforce.model.gguf_header import GGUFHeader, read_header

CONFIG = "config.json"
_OTHERS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_LONGEST_HEADER = 100_000_000  # what the format allows
_POINTER = b"version https://git-lfs"


def find_gguf(source: str) -> Path | None:
    """The GGUF file that a source means; None if it means something else.

    Raises:
        InputError: a file or folder that is not there, or holds no model.
    """
    folder, gguf = locate(source)
    return Path(folder) / gguf if gguf else None


def locate(source: str) -> tuple[str, str | None]:
    """Folder or hub id, and the GGUF file's name if it is one."""
    path = Path(os.path.expanduser(source))  # Path's own raises where there is no such user
    if path.suffix == ".gguf" and not os.path.isdir(path):
        if not os.path.isfile(path):
            raise InputError(f"no such file: {source}")
        return str(path.parent), path.name
    if os.path.isdir(path):
        if os.path.exists(path / "config.json"):
            return str(path), None
        file = lone_gguf(source, path)
        if file is None:
            raise InputError(f"folder {source} holds neither config.json nor a GGUF file")
        return str(path), file.name
    if os.path.isfile(path):
        raise InputError(f"{source} is a file but not a .gguf file; give a model folder, a GGUF file or a hub id")
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source:
        raise InputError(f"no such file or folder: {source}")
    return source, None


def lone_gguf(source: str, folder: Path) -> Path | None:
    """The one GGUF file in a folder; None if there is none. ``source``: what the folder was called.

    Raises:
        InputError: there are several.
    """
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        raise InputError(f"folder {source} holds {len(files)} GGUF files; name one")
    return files[0] if files else None


def check_files(folder: str, gguf: str | None) -> GGUFHeader | None:
    """Refuse local files that are not whole; returns a GGUF file's header."""
    if gguf:
        return read_header(Path(folder) / gguf)
    if os.path.isdir(folder):
        check_folder(Path(folder))
    return None


def check_folder(folder: Path) -> None:
    """Look at what transformers would read. Weights in other formats than safetensors are left to it.

    Raises:
        InputError: a file is missing, damaged or incomplete: which, and by how much.
    """
    for name in (CONFIG, *_OTHERS):
        if name == CONFIG or (folder / name).exists():
            read_object(folder / name)
    if (folder / _WHOLE).is_file():
        _check_weights(folder / _WHOLE)
    elif (folder / _INDEX).is_file():
        names = _shards(folder / _INDEX)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            shown = ", ".join(missing[:3]) + (" and so on" if len(missing) > 3 else "")
            raise InputError(f"{folder} lacks {len(missing)} of {len(names)} files of weights: {shown}; get them again")
        for name in names:
            _check_weights(folder / name)


def shard_names(folder: Path) -> list[str]:
    """The safetensors files that hold a folder's weights; none where they are in another format, or not there.

    Raises:
        InputError: an index that is none.
    """
    if (folder / _WHOLE).is_file():
        return [_WHOLE]
    return _shards(folder / _INDEX) if (folder / _INDEX).is_file() else []


def read_object(path: Path) -> dict[str, Any]:
    """The one JSON object that a file holds.

    Raises:
        InputError: it holds none, or cannot be read.
    """
    try:
        start = path.read_bytes()
        value = json.loads(start)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if start.startswith(_POINTER):
            raise InputError(f"{path} is a Git LFS pointer, which `git lfs pull` replaces with the file") from error
        raise InputError(f"{path} is not a valid JSON file: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold one JSON object")
    return value


def _shards(index: Path) -> list[str]:
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{index} is not an index of weights: it has no weight_map from names to files")
    return sorted(set(names.values()))


def _check_weights(path: Path) -> None:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            header = file.read(length if length <= _LONGEST_HEADER else len(_POINTER) - 8)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if start + header == _POINTER:
        raise InputError(f"{path} is a Git LFS pointer, which `git lfs pull` replaces with the weights")
    if size < 8:
        raise InputError(f"{path} is incomplete: it has {size} bytes; get it again")
    if length > _LONGEST_HEADER:
        raise InputError(f"{path} is not a safetensors file: it starts with {start!r}")
    if size < 8 + length:
        raise InputError(f"{path} is incomplete: its header alone takes {8 + length:,} bytes of {size:,}; get it again")
    needed = 8 + length + _data_bytes(path, header)
    if size < needed:
        raise InputError(f"{path} is incomplete: {size:,} of {needed:,} bytes, {needed - size:,} too few; get it again")


def _data_bytes(path: Path, header: bytes) -> int:
    try:
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        return max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise InputError(f"{path} is damaged: its header is not one of safetensors; get it again") from error
