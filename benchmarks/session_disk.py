"""Saving and loading a session against what the disk itself does, one after the other in the same run.

The disk's own rate: one file of the session's size, written in pieces of 16 MB and synced (fsync), and read again from
the disk, not from memory (posix_fadvise drops what the page cache holds of it). A session of random numbers is saved to
the same disk and read back, every shard with its checksum, and copied into memory as caches would. All of it is done
``repeats`` times in turns; the best of each counts, and all are kept. (On a virtual machine whose host takes free
memory back, any of the four may be the one that has to fetch the pages for the page cache again, which takes 2 to 3
times as long as the disk: medians then tell whose turn that was.)

    python -m benchmarks.session_disk FOLDER [--tokens 32768] [--repeats 7] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path

import torch

from offload_triforce.machine.describe import describe_machine
from offload_triforce.model.identity import ModelIdentity
from offload_triforce.runtime.held import HeldText, KVShape
from offload_triforce.runtime.session_files import open_text, save_text
from offload_triforce.runtime.session_folder import load_manifest

IDENTITY = ModelIdentity("benchmark", "0" * 32, "0" * 32)
PIECE = 16 * 2**20
SHAPE = KVShape(16, 4, 256, torch.bfloat16)  # of Qwen3.5-27B: 65,536 bytes per token
TILE = 4096  # tokens that are asked for at a time


def make_text(tokens: int) -> HeldText:
    """Random numbers: a disk that compresses gains nothing."""
    layer = torch.randint(-(2**15), 2**15, (2, SHAPE.kv_heads, tokens, SHAPE.head_dim), dtype=torch.int16)
    kv = [(layer + index).view(SHAPE.dtype) for index in range(SHAPE.layers)]
    return HeldText(torch.arange(tokens), [], SHAPE, kv)


def timed(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def write_plainly(path: Path, size: int, piece: memoryview) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        for _ in range(size // len(piece)):
            os.write(descriptor, piece)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_plainly(path: Path, into: memoryview) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while os.readv(descriptor, [into]):
            pass
    finally:
        os.close(descriptor)


def drop(paths: list[Path]) -> None:
    """Forget what memory holds of files that are on disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def load(folder: Path, target: torch.Tensor) -> None:
    """All of a session, in the order in which caches are filled. ``target``: [2, K, TILE, D], like a tile's memory."""
    text = open_text(folder, IDENTITY, SHAPE)
    count = len(text.tokens)
    for layer in range(SHAPE.layers):
        for start in range(0, count, TILE):
            kv = text.read(layer, start, min(start + TILE, count))
            target[:, :, : kv.shape[2]].copy_(kv)


def measure(folder: Path, tokens: int, repeats: int) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    text = make_text(tokens)
    size = tokens * SHAPE.token_bytes
    piece = memoryview(text.kv[0].view(-1).view(torch.uint8)[:PIECE].numpy())
    into = memoryview(bytearray(PIECE))
    target = torch.empty(2, SHAPE.kv_heads, TILE, SHAPE.head_dim, dtype=SHAPE.dtype)
    plain, session = folder / "plain", folder / "session"
    times: dict[str, list[float]] = {"write": [], "save": [], "read": [], "load": []}
    try:
        for _ in range(repeats):
            shutil.rmtree(session, ignore_errors=True)
            plain.unlink(missing_ok=True)
            times["write"].append(timed(lambda: write_plainly(plain, size, piece)))
            drop([plain])
            times["save"].append(timed(lambda: save_text(session, text, IDENTITY)))
            shards = [session / file.name for file, _ in load_manifest(session).contents]
            drop(shards)
            times["read"].append(timed(lambda: read_plainly(plain, into)))
            times["load"].append(timed(lambda: load(session, target)))
    finally:
        shutil.rmtree(session, ignore_errors=True)
        plain.unlink(missing_ok=True)
    rates = {name: [size / seconds / 1e9 for seconds in found] for name, found in times.items()}
    best = {name: max(found) for name, found in rates.items()}
    return {
        "machine": describe_machine(),
        "tokens": tokens,
        "bytes": size,
        "gb_per_s": best,
        "gb_per_s_all": rates,
        "save_over_write": best["save"] / best["write"],
        "load_over_read": best["load"] / best["read"],
        "loadavg": os.getloadavg(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="on the disk to measure")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report = measure(args.folder, args.tokens, args.repeats)
    for name, rate in report["gb_per_s"].items():
        print(f"{name:6} {rate:6.2f} GB/s   ({', '.join(f'{one:.2f}' for one in report['gb_per_s_all'][name])})")
    print(f"saving / the disk's own writing: {report['save_over_write']:.2f}")
    print(f"loading / the disk's own reading: {report['load_over_read']:.2f}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
