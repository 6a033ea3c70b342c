"""What a folder holds already of a text that is to be saved there, and need not be written again."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from offload_triforce.cache.layer import Snapshot
from offload_triforce.errors import InputError, StorageError
from offload_triforce.runtime.held import Checkpoint, TextSource
from offload_triforce.runtime.ids import common_prefix
from offload_triforce.runtime.session_folder import check_file, open_file
from offload_triforce.runtime.session_manifest import FileEntry, Manifest, PointEntry
from offload_triforce.runtime.session_reader import DTYPES, PartsOnDisk, open_text
from offload_triforce.runtime.shard_header import TensorEntry, header_of, in_order
from offload_triforce.runtime.shard_writer import checksum_of

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def kept_blocks(folder: Path, old: Manifest | None, new: Manifest, source: TextSource, ids: Tensor) -> int:
    """How many blocks of each layer stay: those that lie wholly within what both texts begin with.

    The same tokens that were read once more, in other chunks or on another device, have other last bits. As each token
    attends to all before it, they show in the last layer: there the last token of each block is compared.
    """
    if old is None or (old.block, old.long) != (new.block, new.long) or not new.layers:
        return 0
    try:
        held = open_text(folder, old.model, source.shape)
    except (InputError, StorageError):
        return 0
    common = common_prefix(held.tokens, ids)
    kept = 0
    while kept < min(old.blocks, new.blocks) and old.reach(kept) == new.reach(kept) and new.reach(kept)[1] <= common:
        if not _ends_the_same(folder, old, kept, source):
            break
        kept += 1
    return kept


def _ends_the_same(folder: Path, old: Manifest, block: int, source: TextSource) -> bool:
    """Whether the last token of a block has the same keys and values in the last layer, on disk and in the source."""
    last, entry = old.layers - 1, old.kv(block)
    _, heads, tokens, width = entry.shape
    stop = old.reach(block)[1]
    rows = source.read(last, stop - 1, stop).contiguous().view(2 * heads, width)
    size, start = rows.nbytes // len(rows), len(header_of([entry]))
    descriptor = open_file(folder, old.shards[last][block])
    try:
        places = [start + ((row + 1) * tokens - 1) * size for row in range(len(rows))]
        return all(
            os.pread(descriptor, size, place) == bytes(bytes_of(row)) for place, row in zip(places, rows, strict=True)
        )
    finally:
        os.close(descriptor)


def known_point(folder: Path, old: Manifest | None, point: Checkpoint) -> PointEntry | None:
    """Where a checkpoint lies already, to the last bit; else None."""
    for other in old.points if old else ():
        if isinstance(point.parts, PartsOnDisk) and (point.parts.folder, point.parts.entry) == (folder, other):
            return other if _is_there(folder, other.file) else None  # that one was read from here, or will be
        if other.tokens == point.tokens and list(other.parts) == entries_of(point.parts):
            same = checksum_of(header_of(other.parts), data_of(point.parts)) == other.file.checksum
            return other if same and _is_there(folder, other.file) else None
    return None


def _is_there(folder: Path, file: FileEntry) -> bool:
    try:
        check_file(folder, file, os.lstat(folder / file.name))
    except (InputError, OSError):
        return False
    return True


def entries_of(parts: Snapshot) -> list[TensorEntry]:
    """What the file of a checkpoint holds, or of what was read in part, in order."""
    if isinstance(parts, PartsOnDisk):
        return list(parts.entry.parts)
    return in_order([TensorEntry(n, DTYPE_NAMES[part.dtype], tuple(part.shape)) for n, part in parts.items()])


def data_of(parts: Snapshot) -> list[memoryview]:
    """Its bytes."""
    return [bytes_of(parts[entry.name]) for entry in entries_of(parts)]


def bytes_of(tensor: Tensor) -> memoryview:
    """A host tensor's bytes; without a copy, if it is in one piece."""
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
