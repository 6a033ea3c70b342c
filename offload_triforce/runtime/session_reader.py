"""A text that lies on disk: opened, checked against the model that is to go on with it, and read block by block."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from offload_triforce.errors import BusyError, InputError, TriForceError
from offload_triforce.model.identity import ModelIdentity
from offload_triforce.runtime.held import Checkpoint, KVShape
from offload_triforce.runtime.part import PartRead
from offload_triforce.runtime.session_check import THREADS, Progress, read_into
from offload_triforce.runtime.session_folder import check_files, damaged, load_manifest
from offload_triforce.runtime.session_manifest import FileEntry, Manifest, PartEntry, PointEntry, tokens_of
from offload_triforce.runtime.shard_header import TensorEntry, in_order

DTYPES = {
    "F64": torch.float64, "I64": torch.int64, "F32": torch.float32, "I32": torch.int32, "F16": torch.float16,
    "BF16": torch.bfloat16, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
AHEAD = 4  # blocks that are read before they are asked for


def open_text(folder: Path, identity: ModelIdentity, expected: KVShape, progress: Progress | None = None) -> TextOnDisk:
    """Open a saved session to go on with. Keys and values are read, and their sums checked, as they are asked for.

    Args:
        folder: of the session. identity: of the model that goes on. expected: what that model's caches hold.
        progress: told (bytes read, bytes in all) of the keys and values, in the thread that reads.

    Raises:
        InputError: there is none, or one of another model, dtype or version, or a damaged one.
        StorageError: the disk does not give it out.
    """
    manifest = load_manifest(folder)
    check_model(folder, manifest, identity, expected)
    check_files(folder, manifest)
    ids = _read(folder, manifest.tokens, [tokens_of(manifest.ids)])["tokens"]
    if int(ids.min()) < 0:
        raise damaged(folder, f"{manifest.tokens.name} holds a negative id")
    return TextOnDisk(folder, manifest, expected, ids.long(), progress)


def check_model(folder: Path, manifest: Manifest, identity: ModelIdentity, expected: KVShape) -> None:
    """Whether a session can be gone on with by a model.

    Raises:
        InputError: what is different.
    """
    sizes = (manifest.layers, manifest.kv_heads, manifest.head_dim)
    wanted = (expected.layers, expected.kv_heads, expected.head_dim)
    if sizes != wanted:
        found, here = ("{} layers of {} KV heads of {}".format(*some) for some in (sizes, wanted))
        raise InputError(
            f"the session at {folder} is of {manifest.model.name}, with {found}, and this model has {here}; load the "
            "model that it was saved with, or name another session"
        )
    dtype = DTYPES[manifest.dtype]
    if dtype != expected.dtype:
        raise InputError(
            f"the session at {folder} has keys and values in {str(dtype)[6:]}, and this model computes them in "
            f"{str(expected.dtype)[6:]}; load it with dtype {str(dtype)[6:]}, or name another session"
        )
    difference = manifest.model.difference(identity)
    if difference is not None:
        raise InputError(
            f"the session at {folder} is of {manifest.model.name}, and this model ({identity.name}) has {difference}; "
            "load the model that it was saved with, or name another session"
        )


class TextOnDisk:
    """A ``TextSource`` in a folder. Blocks are read whole, some of them ahead; for one thread at a time."""

    def __init__(
        self, folder: Path, manifest: Manifest, shape: KVShape, tokens: Tensor, progress: Progress | None
    ) -> None:
        """See ``open_text``. ``tokens``: ids, those of what was read in part too."""
        self.folder, self.manifest, self.shape = folder, manifest, shape
        self.tokens, self.long = tokens[: manifest.length], manifest.long
        self._in_part = tokens[manifest.length :]
        self.checkpoints: Sequence[Checkpoint] = [CheckpointOnDisk.of(folder, point) for point in manifest.points]
        self._progress = progress
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="session")  # ends with this object
        self._buffers = Buffers(manifest.kv(0).size)
        self._blocks: dict[int, Future[Tensor]] = {}  # in the order of reading: those of the first layer, and so on
        self._last = -1
        self._seen: set[int] = set()
        self._done, self._total = 0, sum(shard.size for layer in manifest.shards for shard in layer)

    @property
    def part(self) -> PartRead | None:
        """See ``TextSource``: each time anew, so that what was read of it does not outlast who has asked for it."""
        if (part := self.manifest.part) is None:
            return None
        tensors = PartsOnDisk(self.folder, part)
        return PartRead(self.manifest.length, self._in_part, part.chunk, part.layer, part.done, tensors)

    def read(self, layer: int, start: int, stop: int) -> Tensor:
        """See ``TextSource``.

        Raises:
            InputError: a shard is damaged. StorageError: it cannot be read. BusyError: it was replaced since.
        """
        manifest = self.manifest
        if not (0 <= layer < manifest.layers and 0 <= start <= stop <= manifest.length):
            raise IndexError(f"layer {layer}, tokens {start} to {stop} of {manifest.layers} and {manifest.length}")
        if start == stop:
            return torch.empty(2, manifest.kv_heads, 0, manifest.head_dim, dtype=self.shape.dtype)
        parts = []
        for block in range(start // manifest.block, (stop - 1) // manifest.block + 1):
            begin, end = manifest.reach(block)
            kv = self._block(layer * manifest.blocks + block)
            parts.append(kv[:, :, max(start, begin) - begin : min(stop, end) - begin])
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _block(self, place: int) -> Tensor:
        ahead = AHEAD if place in (self._last, self._last + 1) else 0
        wanted = range(place, min(place + ahead + 1, self.manifest.layers * self.manifest.blocks))
        for gone in [other for other in self._blocks if other not in wanted]:
            self._blocks.pop(gone).cancel()
        for other in wanted:
            if other not in self._blocks:
                self._blocks[other] = self._pool.submit(self._load, other)
        self._last = place
        kv = self._blocks[place].result()
        if place not in self._seen:
            self._seen.add(place)
            self._done += self._shard(place)[0].size
            if self._progress is not None:
                self._progress(self._done, self._total)
        return kv

    def _shard(self, place: int) -> tuple[FileEntry, TensorEntry]:
        layer, block = divmod(place, self.manifest.blocks)
        return self.manifest.shards[layer][block], self.manifest.kv(block)

    def _load(self, place: int) -> Tensor:
        file, entry = self._shard(place)
        try:
            return _read(self.folder, file, [entry], self._buffers.take(entry.size))[entry.name]
        except InputError as error:
            replaced = self._replaced()
            if replaced is None:
                raise
            raise replaced from error

    def _replaced(self) -> BusyError | None:
        """Why a file is not as it was: what was opened here is not there any more, and not damaged either."""
        try:
            if load_manifest(self.folder) == self.manifest:
                return None
        except TriForceError:
            return None
        return BusyError(
            f"the session at {self.folder} was saved anew by somebody else since it was opened here; load it "
            "again, and let each process have a session of its own"
        )


class Buffers:
    """Memory for blocks, which is used again once nobody looks at a block that was in it.

    New memory is mapped page by page as it is written: for blocks of 16 MB, that takes as long as to copy them out of
    the page cache.
    """

    def __init__(self, size: int) -> None:
        """``size``: bytes of the largest block."""
        self._size, self._free = size, deque[np.ndarray]()

    def take(self, size: int) -> Tensor:
        """Bytes (size,), undefined. From any thread."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(self._size, dtype=np.uint8)
        lent = memory[:size]
        # Whatever views a tensor has, they keep alive the array that it was made of.
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return torch.from_numpy(lent)


class CheckpointOnDisk(Checkpoint):
    """A checkpoint whose parts are read when the first of them is asked for."""

    @classmethod
    def of(cls, folder: Path, point: PointEntry) -> CheckpointOnDisk:
        """``point``: of the manifest of the session at ``folder``."""
        return cls(point.tokens, PartsOnDisk(folder, point))

    @property
    def size(self) -> int:
        """Bytes; nothing is read to count them."""
        return sum(entry.size for entry in self.parts.entry.parts)


class PartsOnDisk(Mapping[str, Tensor]):
    """The parts of a checkpoint, or of what was read in part, by name.

    Attributes:
        folder: of the session. entry: what its manifest says of them.
    """

    def __init__(self, folder: Path, entry: PointEntry | PartEntry) -> None:
        self.folder, self.entry = folder, entry
        self._parts: dict[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        if self._parts is None:
            self._parts = _read(self.folder, self.entry.file, self.entry.parts)
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(part.name for part in self.entry.parts)

    def __len__(self) -> int:
        return len(self.entry.parts)


def _read(
    folder: Path, file: FileEntry, tensors: Sequence[TensorEntry], data: Tensor | None = None
) -> dict[str, Tensor]:
    """All tensors of a file, by name; in ``data`` (bytes,), or in memory of their own."""
    if data is None:
        data = torch.empty(sum(tensor.size for tensor in tensors), dtype=torch.uint8)
    read_into(folder, file, tensors, memoryview(data.numpy()))
    found, at = {}, 0
    for tensor in in_order(tensors):
        part = data[at : at + tensor.size]
        found[tensor.name] = part.view(DTYPES[tensor.dtype]).view(tensor.shape)
        at += tensor.size
    return found
