"""Reading the files of a saved session: every byte is held against what the manifest says of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from offload_triforce.runtime.session_folder import cannot_read, check_files, damaged, load_manifest, open_file
from offload_triforce.runtime.session_manifest import FileEntry, Manifest
from offload_triforce.runtime.shard_header import TensorEntry, header_of

Progress = Callable[[int, int], None]  # told (bytes done, bytes in all)
THREADS = 3  # two wait for the disk, so that it always has something to do, while the other adds up
_PIECE = 4 * 2**20


def verify_text(folder: Path, progress: Progress | None = None) -> Manifest:
    """Read a whole session and compare all checksums. Returns what its manifest says.

    Raises:
        InputError: what is damaged. StorageError: what cannot be read.
    """
    manifest = load_manifest(folder)
    check_files(folder, manifest)
    done, total = 0, manifest.size
    with ThreadPoolExecutor(THREADS) as pool:
        waiting = [(file, pool.submit(_verify, folder, file, tensors)) for file, tensors in manifest.contents]
        try:
            for file, verdict in waiting:
                verdict.result()
                done += file.size
                if progress is not None:
                    progress(done, total)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return manifest


def _verify(folder: Path, file: FileEntry, tensors: Sequence[TensorEntry]) -> None:
    read_into(folder, file, tensors, None)


def read_into(folder: Path, file: FileEntry, tensors: Sequence[TensorEntry], data: memoryview | None) -> None:
    """Read a file, check its header and its sum, and put its tensors' bytes into ``data``; None throws them away.

    They are read, not mapped: a file that is cut meanwhile, or a bad disk, ends in a sentence and not in a signal.

    Raises:
        InputError: what is damaged. StorageError: what cannot be read.
    """
    header = header_of(tensors)
    whole = xxhash.xxh3_128()
    buffer = memoryview(bytearray(min(_PIECE, file.size))) if data is None else data
    descriptor = open_file(folder, file)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)  # all at once: a disk is quick with many requests
        found = os.read(descriptor, len(header))
        if found != header:
            raise damaged(folder, f"{file.name} begins with another header than its tensors have")
        whole.update(found)
        size = file.size - len(header)
        at = 0
        while at < size:
            piece = buffer[: min(_PIECE, size - at)] if data is None else buffer[at : min(at + _PIECE, size)]
            count = os.readv(descriptor, [piece])
            if not count:
                raise damaged(folder, f"{file.name} ends after {at + len(header):,} of {file.size:,} bytes")
            whole.update(piece[:count])
            at += count
    except OSError as error:
        raise cannot_read(folder / file.name, error) from error
    finally:
        os.close(descriptor)
    if whole.hexdigest() != file.checksum:
        raise damaged(folder, f"{file.name} does not have the checksum that it was saved with")
