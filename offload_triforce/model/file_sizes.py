"""How many bytes the weights in a folder's files take, part by part: read from the headers of safetensors files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from offload_triforce.errors import InputError
from offload_triforce.model.counts import Counts, Part
from offload_triforce.model.layers import NAMES
from offload_triforce.model.local_files import check_folder, shard_names

# Of other parts than the text decoder: they are not loaded.
_ELSEWHERE = re.compile(
    r"(^|\.)(visual|vision\w*|audio\w*|image\w*|multi_modal\w*|mm_\w*|embed_vision|embed_audio|mtp)\."
)
# What is not packed, and what its numbers take in the file.
_NOT_PACKED, _BYTES = (".weight", ".bias"), {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_LAYER = re.compile(rf"(^|\.)({'|'.join(NAMES)})\.(\d+)\.")


def counts_in_files(folder: Path, counts: Counts, itemsize: int) -> Counts | None:
    """The same counts, with the bytes that the files hold. None where the files are not there, or of another format.

    Args:
        counts: of the same model, not packed. itemsize: of its dtype.

    Raises:
        InputError: files that are damaged or not whole.
    """
    check_folder(folder)
    files = shard_names(folder)
    if not files:
        return None
    inside = experts = outside = 0
    for name, size in (entry for file in files for entry in _tensors(folder / file, itemsize)):
        layer = _LAYER.search(name)
        if _ELSEWHERE.search(name) or (layer and int(layer[3]) >= counts.layers):  # MTP heads come behind the last one
            continue
        if layer is None:
            outside += size
        elif ".experts." in name:
            experts += size
        else:
            inside += size
    parts = {"inside": inside, "experts": experts, "outside": outside}
    held = {name: _holding(getattr(counts, name), size, itemsize) for name, size in parts.items()}
    return replace(counts, **held, largest=0, matrices=())


def _holding(part: Part, size: int, itemsize: int) -> Part:
    """As many parameters, in so many bytes. None of them is packed again."""
    return Part(part.parameters, extra=size - part.parameters * itemsize)


def _tensors(file: Path, itemsize: int) -> Iterator[tuple[str, int]]:
    """Names of what a safetensors file holds, and bytes: what is not packed is read in the model's dtype."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        if end < start:
            raise InputError(f"{file} is damaged: {name} ends before it begins; get it again")
        size = end - start
        if name.endswith(_NOT_PACKED) and (held := _BYTES.get(entry["dtype"])):
            size = size // held * itemsize
        yield name, size
