"""Writing the files of a session: some at a time, each summed up, written and on disk (fsync) before it counts."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import xxhash

from offload_triforce.runtime.session_manifest import FileEntry
from offload_triforce.runtime.shard_header import TensorEntry, header_of

THREADS = 3  # the disk is kept busy while others add up, or wait for their fsync
Progress = Callable[[int, int], None]  # told (bytes done, bytes in all)


class ShardWriter:
    """Writes files of a folder in threads.

    Attributes:
        written: bytes that are on disk. files: how many.
    """

    def __init__(self, folder: Path, total: int, progress: Progress | None = None) -> None:
        """``total``: bytes to come. ``progress``: told of them in the thread that calls."""
        self._folder, self._total, self._progress = folder, total, progress
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="session")
        self._running: set[Future[FileEntry]] = set()
        self.written = self.files = 0

    def write(self, name: str, tensors: Sequence[TensorEntry], data: Sequence[memoryview]) -> Future[FileEntry]:
        """Begin to write a file; returns its entry to come. ``data``: of the tensors, as they lie in the file.

        Waits while there is more to write than hands to write it. The data must stay as it is until it is written.

        Raises:
            OSError: of a file that was begun before.
        """
        entry = self._pool.submit(_write, self._folder / name, header_of(tensors), data)
        self._running.add(entry)
        while len(self._running) > THREADS:
            self._wait_for_one()
        return entry

    def finish(self) -> None:
        """All files are on disk. Raises OSError of the one that is not."""
        while self._running:
            self._wait_for_one()

    def _wait_for_one(self) -> None:
        done, self._running = wait(self._running, return_when=FIRST_COMPLETED)
        for future in done:
            self.written += future.result().size
            self.files += 1
        if self._progress is not None:
            self._progress(self.written, self._total)

    def close(self) -> None:
        """End the threads, when they are through with what they are at."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _write(path: Path, header: bytes, data: Sequence[memoryview]) -> FileEntry:
    return FileEntry(path.name, write_file(path, [memoryview(header), *data]), checksum_of(header, data))


def checksum_of(header: bytes, data: Sequence[memoryview]) -> str:
    """Of a whole file, before or after it is written."""
    whole = xxhash.xxh3_128(header)
    for part in data:
        whole.update(part)
    return whole.hexdigest()


def write_file(path: Path, data: Sequence[memoryview]) -> int:
    """Write a new file and see it onto the disk; returns its bytes. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        size = 0
        for part in data:
            at = 0
            while at < len(part):
                at += os.write(descriptor, part[at:])
            size += len(part)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return size


def sync_folder(folder: Path) -> None:
    """What was created, renamed and removed in a folder is on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
