"""How many bytes the lossless coding of tiles saves, on keys and values of real models, and how fast a CPU codes.

The models read Python's own library; a model of random weights reads random tokens. Their keys and values, in bfloat16
and in float16, are cut into tiles and coded as on their way to host memory; every tile that fits is decoded and
compared bit by bit. "In use" is what a tile's extensions and escapes take of their room: the rate is fixed, and a tile
that needs more stays raw.

Other codes are worked out from the same exponents (bfloat16, every fourth layer), with the best level that each block
of 64 tokens could have and no fixed room: bits per exponent, so what the kernels write can be compared.

    python -m benchmarks.wire_rates [--models smollm2 qwen-coder random] [--tokens 4096] [--keep FOLDER] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload_triforce import TriForce
from offload_triforce.bench.shapes import random_model
from offload_triforce.bench.tasks import find_task, prompts
from offload_triforce.kernels import ops
from offload_triforce.kernels.wire_format import BLOCK, WireFormat, parts
from offload_triforce.machine.describe import describe_machine
from offload_triforce.model.fetch import fetch_model
from offload_triforce.runtime.reading import Reading

REPEATS = 5
TOKENS = {"smollm2": 4096, "qwen-coder": 2048}
RANDOM_SHAPE, RANDOM_TOKENS = "smollm2", 1024
# Bits that an exponent takes so far below its block's level; all others are escapes, whose bits are under None.
WAYS: dict[str, dict[int | None, int]] = {
    "2 bits, else 3, else 8 (ours)": {0: 2, 1: 2, 2: 2} | dict.fromkeys([-2, -1, 3, 4, 5, 6, 7], 5) | {None: 13},
    "3 bits, else 8": dict.fromkeys(range(7), 3) | {None: 11},
    "4 bits, else 8": dict.fromkeys(range(15), 4) | {None: 12},
    "2 bits, else 8": dict.fromkeys(range(3), 2) | {None: 10},
    "2 bits, else 4, else 8": {0: 2, 1: 2, 2: 2} | dict.fromkeys([*range(-4, 0), *range(3, 14)], 6) | {None: 14},
    "classes of 1, 1, 2 and 7": {0: 2, 1: 2, 2: 3, -1: 3} | dict.fromkeys([-3, -2, 3, 4, 5, 6, 7], 5) | {None: 13},
}


def keys_and_values(model: str, tokens: int, keep: Path | None) -> list[Tensor]:
    """Of each layer, [2, K, T, D] in bfloat16; from the folder ``keep`` if they were put there before."""
    kept = keep and keep / f"{model}-{tokens}.pt"
    if kept and kept.exists():
        return torch.load(kept)
    layers = read(model, tokens)
    if kept:
        torch.save(layers, kept)
    return layers


def read(model: str, tokens: int) -> list[Tensor]:
    """Let the model read so many tokens."""
    if model == "random":
        net = random_model(RANDOM_SHAPE, torch.float32, torch.device("cpu"), RANDOM_TOKENS)
        ids = torch.randint(0, net.config.vocab_size, (1, RANDOM_TOKENS), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            cache = net.model(ids, use_cache=True).past_key_values
        return [torch.cat((layer.keys, layer.values)).bfloat16() for layer in cache.layers]
    engine = TriForce.load(fetch_model(model), "ngram", dtype="float32", context=tokens + 64)
    task = find_task("continue")
    ids = prompts(engine.tokenizer, [task], tokens)[task][:tokens]
    reading = Reading.of(engine.model, engine.layout, ids)
    return [part.kv[:, :, : len(ids)].bfloat16() for part in reading.layers]


def tiles(layers: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """All whole tiles of so many tokens."""
    return [kv[:, :, at : at + tokens] for kv in layers for at in range(0, kv.shape[2] - tokens + 1, tokens)]


def rates(found: Sequence[Tensor]) -> dict[str, Any]:
    """Code all tiles of one dtype, and decode those that fit."""
    _, heads, tokens, dim = found[0].shape
    form = WireFormat(heads, tokens, dim, found[0].dtype)
    coded, again = torch.zeros(form.bytes, dtype=torch.uint8), torch.empty_like(found[0])
    used, bits, raw = [], [], 0
    for kv in found:
        ops.wire_encode(kv, coded, form)
        part = parts(coded, form)
        sizes = part.sizes.view(2, -1).sum(1) * 8 / (form.values / 2)
        used.append(part.sizes.sum().item() / form.room)
        bits.append((8 * form.begins[-1] / form.values + sizes).tolist())
        if part.header[0] > 0:
            raw += 1
            continue
        ops.wire_decode(coded, again, form)
        if not torch.equal(again.view(torch.int16), kv.contiguous().view(torch.int16)):
            raise AssertionError("a tile came back changed")
    wire = (len(found) - raw) * form.bytes + raw * form.raw_bytes
    return {
        "tile_tokens": tokens,
        "tiles": len(found),
        "raw_tiles": raw,
        "ratio": form.ratio,
        "ratio_with_raw_tiles": len(found) * form.raw_bytes / wire,
        "in_use": {"mean": statistics.mean(used), "max": max(used)},
        "bits_per_value": {name: statistics.mean(pair[i] for pair in bits) for i, name in enumerate("kv")},
    }


def exponent_bits(layers: Sequence[Tensor]) -> dict[str, dict[str, float]]:
    """Bits per exponent, of keys and of values, by each of WAYS (with the levels), and the entropy per channel."""
    sums: dict[str, list[list[float]]] = {name: [[], []] for name in (*WAYS, "entropy per channel")}
    for kv in layers[::4]:
        whole = kv.shape[2] // BLOCK * BLOCK
        exponent = (kv[:, :, :whole].contiguous().view(torch.int16).int() >> 7 & 0xFF).transpose(2, 3)
        for part in (0, 1):
            blocks = exponent[part].reshape(-1, BLOCK)
            counts = torch.zeros(blocks.shape[0], 256).scatter_add_(1, blocks.long(), torch.ones(blocks.shape))
            for name, way in WAYS.items():
                cost = torch.full((256, 256), float(way[None]))  # of an exponent, at a level
                for below, bits in way.items():
                    if below is not None:
                        cost.diagonal(below).fill_(bits)  # exponent i, level i + below
                best = (counts @ cost).amin(1).sum() / blocks.numel() + 8 / BLOCK
                sums[name][part].append(best.item())
            channels = exponent[part].reshape(-1, whole)
            share = torch.zeros(channels.shape[0], 256).scatter_add_(1, channels.long(), torch.ones(channels.shape))
            entropy = torch.special.entr(share / whole).sum(1).mean().item() / torch.tensor(2.0).log().item()
            sums["entropy per channel"][part].append(entropy)
    return {
        name: {part: statistics.mean(found) for part, found in zip("kv", pair, strict=True)}
        for name, pair in sums.items()
    }


def speeds(kv: Tensor) -> dict[str, float]:
    """GB of raw bytes per second that one thread codes and decodes: the best of some repeats."""
    form = WireFormat(kv.shape[1], kv.shape[2], kv.shape[3], kv.dtype)
    coded, again = torch.zeros(form.bytes, dtype=torch.uint8), torch.empty_like(kv)
    best: dict[str, float] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(REPEATS + 1):  # the first one compiles
        for name, work in (
            ("encode", lambda: ops.wire_encode(kv, coded, form)),
            ("decode", lambda: ops.wire_decode(coded, again, form)),
            ("copy", lambda: again.copy_(kv)),
        ):
            began = time.perf_counter()
            work()
            best[name] = min(best.get(name, float("inf")), time.perf_counter() - began)
    torch.set_num_threads(threads)
    return {name: form.raw_bytes / seconds / 1e9 for name, seconds in best.items()}


def measure(model: str, tokens: int, tile_tokens: int, keep: Path | None) -> dict[str, Any]:
    layers = keys_and_values(model, tokens, keep)
    found = tiles(layers, tile_tokens)
    return {
        "tokens": layers[0].shape[2],
        "layers": len(layers),
        "kv_heads": layers[0].shape[1],
        "head_dim": layers[0].shape[3],
        "bfloat16": rates(found),
        "float16": rates([kv.half() for kv in found]),
        "exponent_bits": exponent_bits(layers),
        "gb_per_s": speeds(found[len(found) // 2].contiguous()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2", "qwen-coder", "random"])
    parser.add_argument("--tokens", type=int, help=f"default: {TOKENS}")
    parser.add_argument("--tile-tokens", type=int, default=512)
    parser.add_argument("--keep", type=Path, help="a folder for keys and values, to be read again")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {"machine": describe_machine(), "models": {}}
    for model in options.models:
        found = report["models"][model] = measure(
            model, options.tokens or TOKENS.get(model, RANDOM_TOKENS), options.tile_tokens, options.keep
        )
        print(f"{model}: {found['tokens']:,} tokens, {found['layers']} layers")
        for dtype in ("bfloat16", "float16"):
            rate = found[dtype]
            print(
                f"  {dtype:9} {rate['ratio']:.3f}x, {rate['raw_tiles']} of {rate['tiles']} tiles stay raw "
                f"({rate['ratio_with_raw_tiles']:.3f}x with them); room in use {rate['in_use']['mean']:.0%}, at most "
                f"{rate['in_use']['max']:.0%}; keys {rate['bits_per_value']['k']:.2f} bits, values "
                f"{rate['bits_per_value']['v']:.2f}"
            )
        for name, bits in found["exponent_bits"].items():
            print(f"    exponents: {name:30} keys {bits['k']:.3f} bits, values {bits['v']:.3f}")
        speed = found["gb_per_s"]
        print(
            f"  one thread: encode {speed['encode']:.2f} GB/s, decode {speed['decode']:.2f}, copy {speed['copy']:.1f}"
        )
        if options.json:  # what is known so far
            options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
