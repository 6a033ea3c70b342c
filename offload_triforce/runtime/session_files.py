"""Saving a session: its text's keys and values, checkpoints and ids as files of a folder, all or nothing.

New files get names of their own beside the old ones, and are on disk (fsync) before the manifest that names them takes
the place of the old manifest (rename). So whatever is interrupted, the folder holds the session before or the session
after. What is of the same text already stays where it is: see ``session_reuse``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from offload_triforce.errors import InputError, StorageError
from offload_triforce.machine.units import gigabytes
from offload_triforce.model.identity import ModelIdentity
from offload_triforce.runtime.held import Checkpoint, KVShape, TextSource
from offload_triforce.runtime.session_check import verify_text
from offload_triforce.runtime.session_folder import (
    LOCK,
    MANIFEST,
    NEW_MANIFEST,
    NoSession,
    OtherVersion,
    check_free,
    clear_strays,
    describe,
    list_texts,
    load_manifest,
    locked,
    remove_text,
)
from offload_triforce.runtime.session_manifest import (
    MOST_PARTS,
    FileEntry,
    Manifest,
    PartEntry,
    PointEntry,
    part_name,
    point_name,
    shard_name,
    tokens_name,
    tokens_of,
    write_manifest,
)
from offload_triforce.runtime.session_reader import TextOnDisk, open_text
from offload_triforce.runtime.session_reuse import (
    DTYPE_NAMES,
    bytes_of,
    data_of,
    entries_of,
    kept_blocks,
    known_point,
)
from offload_triforce.runtime.shard_header import size_of
from offload_triforce.runtime.shard_writer import Progress, ShardWriter, sync_folder, write_file

__all__ = ["SavedText", "TextOnDisk", "describe", "list_texts", "open_text", "remove_text", "save_text", "verify_text"]

BLOCK = 4096  # tokens of a shard: 16 MB of a layer with 4 KV heads of 256 in 16 bits
_SPARE = 2**20  # bytes, for the manifest and what folders take


@dataclass(frozen=True)
class SavedText:
    """What a save has done. ``size``: bytes of the session; ``written``: of these, now; ``files``: how many."""

    folder: Path
    tokens: int
    size: int
    written: int
    files: int


def save_text(
    folder: Path, source: TextSource, identity: ModelIdentity, progress: Progress | None = None, block: int = BLOCK
) -> SavedText:
    """Save a text; what the folder holds of its beginning already is not written again.

    Args:
        folder: made if it is not there. It holds a session of the same model, or nothing.
        source: the text. It must not change meanwhile, nor must what it has given out.
        identity: of the model that has read it.
        progress: told (bytes written, bytes to write) in this thread.
        block: tokens of a shard.

    Raises:
        InputError: the folder is of something else, or there is nothing to save.
        BusyError: another process is saving there.
        StorageError: the disk is full or refuses. What was there before is there still, whole.
    """
    if not len(source.tokens) and source.part is None:
        raise InputError("there is nothing to save yet: the session has not read any text")
    created = _make(folder)
    try:
        with locked(folder):
            try:
                return _Save(folder, source, identity, block).run(progress)
            finally:
                clear_strays(folder)
                if created and not os.path.lexists(folder / MANIFEST):
                    _unmake(folder)  # with the lock in hand: whoever comes next sees that the folder is gone
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _make(folder: Path) -> bool:
    """Make the folder, unless it is there and free for a session; returns whether it was made."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)  # what somebody has asked is nobody else's business
        sync_folder(folder.parent)
        return True
    except FileExistsError as error:
        if not folder.is_dir():
            raise InputError(f"{folder} is a file, or below one; name a folder for the session") from error
    except OSError as error:
        raise _cannot_write(folder, error) from error
    check_free(folder)
    return False


def _unmake(folder: Path) -> None:
    with contextlib.suppress(OSError):
        (folder / LOCK).unlink()
        folder.rmdir()


def _cannot_write(folder: Path, error: OSError) -> StorageError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"the disk of {folder} is full: the session was not saved, and what was saved before stays as it was; "
            "free some space, or name a folder on another disk"
        )
    return StorageError(
        f"the session was not saved to {folder}: {error.strerror or error}; what was saved before stays as it was"
    )


class _Save:
    """One save, within the folder's lock. Whatever OSError it meets is passed on."""

    def __init__(self, folder: Path, source: TextSource, identity: ModelIdentity, block: int) -> None:
        self.folder, self.source, self.stamp = folder, source, secrets.token_hex(8)
        self.ids, self.part = source.tokens, source.part
        if self.part is not None and self.part.held != len(source.tokens):
            raise ValueError(f"a part behind {self.part.held} tokens, of a text of {len(source.tokens)}")
        if self.part is not None and len(source.tokens) and len(self.part.tensors) > MOST_PARTS:
            self.part = None  # what is read whole counts for more
        if self.part is not None:
            self.ids = torch.cat([self.ids, self.part.tokens])
        if int(self.ids.min()) < 0 or int(self.ids.max()) >= 2**31:
            raise ValueError("token ids are not negative, and have 31 bits")
        _check_ascending(source.checkpoints, len(source.tokens))
        shape, empty = source.shape, FileEntry("", 0, "")
        self.old = _older(folder, identity, shape)
        self.new = Manifest(
            int(time.time()), identity, shape.layers, shape.kv_heads, shape.head_dim, DTYPE_NAMES[shape.dtype],
            source.long, len(source.tokens), block, empty, (), (),
        )  # fmt: skip

    def run(self, progress: Progress | None) -> SavedText:
        """Write what is new, then make it count."""
        clear_strays(self.folder)
        kept = kept_blocks(self.folder, self.old, self.new, self.source, self.source.tokens)
        points = [known_point(self.folder, self.old, point) for point in self.source.checkpoints]
        total = self._bytes_to_write(kept, points)
        free = os.statvfs(self.folder)
        if (spare := free.f_bavail * free.f_frsize) < total + _SPARE:
            raise StorageError(
                f"saving to {self.folder} takes {gigabytes(total + _SPARE)}, and its disk has {gigabytes(spare)} left; "
                "free some space, or name a folder on another disk"
            )
        writer = ShardWriter(self.folder, total, progress)
        try:
            manifest = self._write(writer, kept, points)
        finally:
            writer.close()
        data = write_manifest(manifest)
        write_file(self.folder / NEW_MANIFEST, [memoryview(data)])
        sync_folder(self.folder)  # the names of all files, before the manifest that counts on them
        os.replace(self.folder / NEW_MANIFEST, self.folder / MANIFEST)
        sync_folder(self.folder)
        size = manifest.size + len(data)
        return SavedText(self.folder, manifest.length, size, writer.written + len(data), writer.files + 1)

    def _bytes_to_write(self, kept: int, points: Sequence[PointEntry | None]) -> int:
        new, size = self.new, size_of([tokens_of(len(self.ids))])
        size += new.layers * sum(size_of([new.kv(block)]) for block in range(kept, new.blocks))
        for point, known in zip(self.source.checkpoints, points, strict=True):
            size += 0 if known else size_of(entries_of(point.parts))
        return size + (0 if self.part is None else size_of(entries_of(self.part.tensors)))

    def _write(self, writer: ShardWriter, kept: int, points: Sequence[PointEntry | None]) -> Manifest:
        """All files that are not there yet. Returns the manifest that names them."""
        new, coming = self.new, []
        for layer in range(new.layers):
            shards: list[FileEntry | Future[FileEntry]] = list(self.old.shards[layer][:kept]) if self.old else []
            for block in range(kept, new.blocks):
                data = bytes_of(self._kv(layer, block))
                shards.append(writer.write(shard_name(layer, block, self.stamp), [new.kv(block)], [data]))
            coming.append(shards)
        checkpoints = []
        for point, known in zip(self.source.checkpoints, points, strict=True):
            entries, data = entries_of(point.parts), data_of(point.parts)
            file = known.file if known else writer.write(point_name(point.tokens, self.stamp), entries, data)
            checkpoints.append((point.tokens, file, tuple(entries)))
        ids = bytes_of(self.ids.to(torch.int32))
        tokens = writer.write(tokens_name(self.stamp), [tokens_of(len(self.ids))], [ids])
        part = self._write_part(writer)
        writer.finish()
        return replace(
            new,
            part=None if part is None else part(),
            tokens=tokens.result(),
            shards=tuple(tuple(_there(file) for file in shards) for shards in coming),
            points=tuple(PointEntry(count, _there(file), parts) for count, file, parts in checkpoints),
        )

    def _write_part(self, writer: ShardWriter) -> Callable[[], PartEntry] | None:
        """What was read in part. It is written anew each time: it changes as a whole. Returns its entry for later."""
        if (part := self.part) is None:
            return None
        entries, data, tokens = entries_of(part.tensors), data_of(part.tensors), len(part.tokens)
        file = writer.write(part_name(tokens, self.stamp), entries, data)
        return lambda: PartEntry(tokens, part.chunk, part.layer, part.done, _there(file), tuple(entries))

    def _kv(self, layer: int, block: int) -> Tensor:
        start, stop = self.new.reach(block)
        kv, shape = self.source.read(layer, start, stop), self.source.shape
        if kv.shape != (2, shape.kv_heads, stop - start, shape.head_dim) or kv.dtype != shape.dtype:
            raise ValueError(f"the text gives {list(kv.shape)} of {kv.dtype} for {stop - start} tokens of {shape}")
        return kv


def _older(folder: Path, identity: ModelIdentity, shape: KVShape) -> Manifest | None:
    """What the folder holds; None if there is nothing, or nothing that could be read.

    Raises:
        InputError: it is of another model or version, and would be lost.
    """
    try:
        old = load_manifest(folder)
    except OtherVersion:
        raise
    except (NoSession, InputError):
        return None
    same = (old.layers, old.kv_heads, old.head_dim) == (shape.layers, shape.kv_heads, shape.head_dim)
    difference = old.model.difference(identity)
    if difference is None and same and old.dtype == DTYPE_NAMES[shape.dtype]:
        return old
    difference = difference or "another shape or dtype of its keys and values"
    raise InputError(
        f"{folder} holds a session of {old.model.name}, and this model ({identity.name}) has {difference}; name "
        "another folder, or remove that session first"
    )


def _there(file: FileEntry | Future[FileEntry]) -> FileEntry:
    return file if isinstance(file, FileEntry) else file.result()


def _check_ascending(points: Sequence[Checkpoint], length: int) -> None:
    counts = [point.tokens for point in points]
    if counts != sorted(set(counts)) or (counts and not 0 <= counts[0] <= counts[-1] <= length):
        raise ValueError(f"checkpoints ascend within {length} tokens, and these are of {counts}")
