"""What ``aot`` compiles: each kernel with the arguments of real launches, made with tensors without memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from offload_triforce.kernels import (
    attention_state,
    chunk_scores,
    chunk_selection,
    delta_rule,
    fetch,
    int8_product,
    kv_codec,
    packed_attention,
    verify_attention,
    wire_codec,
)
from offload_triforce.kernels.attention_state import SplitAttention
from offload_triforce.kernels.launch import Launch
from offload_triforce.kernels.tiling import MOST_SPLITS
from offload_triforce.kernels.types import (
    AttentionParams,
    ChunkSelection,
    CodedChunks,
    Convolution,
    DeltaNodes,
    DeltaTokens,
    NodeStep,
    TreeMask,
)
from offload_triforce.kernels.wire_format import BLOCK, WireFormat

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DIMS = (64, 80, 96, 128, 192, 256, 512)
ROWS = (13, 32, 52, 772)
FEATURES = ("plain", "odd", "newest", "length", "window", "positions", "softcap", "all")
HEADS = 8


class Case(NamedTuple):
    """What to build: a launch, and what distinguishes it from others of the same kernel."""

    launch: Launch
    parameters: dict[str, Any]


def cases(extent: str) -> Iterator[Case]:
    """Launches of all kernels.

    Args:
        extent: "few", one of each kind; "dims", attention and scores for each head dimension; "usual", these and each
            dtype and feature; "every", all of them combined, which takes an hour.
    """
    makers = (
        _attention_cases,
        _combine_cases,
        _score_cases,
        _take_cases,
        _packed_cases,
        _fetch_cases,
        _recurrent_cases,
        _int8_cases,
        _wire_cases,
    )
    return itertools.chain.from_iterable(make(extent) for make in makers)


def name_of(dtype: torch.dtype) -> str:
    """Of a dtype, without "torch."."""
    return str(dtype).removeprefix("torch.")


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def state(splits: int, rows: int, dim: int, started: bool, heads: int = HEADS) -> SplitAttention:
    """The state of an attention."""
    shape = (splits, heads, rows)
    return SplitAttention(empty(*shape), empty(*shape), empty(*shape, dim), started)


def update(
    dtype: torch.dtype,
    dim: int,
    rows: int,
    feature: str = "plain",
    first: bool = False,
    heads: int = HEADS,
    n: int = 4096,
) -> Launch:
    """Attention over n keys, by ``rows`` packed rows of each KV head."""
    key, value = empty(2, heads, n - (feature == "odd"), dim, dtype=dtype)
    tree_mask = None
    if feature not in ("plain", "odd", "softcap"):
        length = empty(1, dtype=torch.long) if feature in ("length", "all") else None
        positions = empty(rows, dtype=torch.long) if feature in ("positions", "all") else None
        tree_mask = TreeMask(empty(rows, 64, dtype=torch.bool), positions, length)
    window = 1000 if feature in ("window", "positions", "all") else None
    params = AttentionParams(0.125, window, 50.0 if feature in ("softcap", "all") else None)
    packed, so_far = empty(heads, rows, dim, dtype=dtype), state(16, rows, dim, not first, heads)
    return verify_attention.update_launch(so_far, packed, key, value, params, tree_mask)


def scores(dtype: torch.dtype, dim: int, rows: int, chunk: int = 8, heads: int = HEADS, n: int = 4096) -> Launch:
    """Scores of the chunks of n keys."""
    count = n // chunk
    key, held = empty(heads, count * chunk, dim, dtype=dtype), empty(heads, 4 * count, dtype=torch.bool)
    packed, baseline, output = empty(heads, rows, dim, dtype=dtype), empty(heads, rows), empty(heads, count)
    return chunk_scores.score_launch(packed, key, chunk, 0.125, baseline, held, output, 512)


def take(dtype: torch.dtype, dim: int, chunk: int, bits: int, slots: int, count: int, heads: int = HEADS) -> Launch:
    """The choice of k chunks when C are offered."""
    held = empty(heads, 16385, dtype=torch.bool)
    selection = ChunkSelection(empty(heads, slots), empty(heads, slots, dtype=torch.long), held)
    workspace = chunk_selection.Workspace(empty(2, heads, slots, dtype=torch.int32), empty(heads, dtype=torch.int32))
    kv = empty(2, heads, count * chunk, dim, dtype=dtype)
    store = empty(2, heads, slots, chunk, dim, dtype=dtype) if bits == 16 else coded(slots, chunk, dim, bits, heads)
    return chunk_selection.take_launch(selection, empty(heads, count), 512, kv, store, workspace)


def coded(slots: int, chunk: int, dim: int, bits: int, heads: int = HEADS) -> CodedChunks:
    """Packed chunks."""
    codes = [empty(heads, slots, chunk, dim * bits // 8, dtype=torch.uint8) for _ in range(2)]
    ranges = [empty(heads, slots, dim, dtype=torch.uint8) for _ in range(2)]
    tokens = [empty(heads, slots, chunk, dtype=torch.float16) for _ in range(2)]
    return CodedChunks(*codes, *ranges, *tokens, *(empty(heads, dim) for _ in range(2)))


def packed_update(
    dtype: torch.dtype, dim: int, rows: int, chunk: int = 8, bits: int = 4, first: bool = False, feature: str = "plain"
) -> Launch:
    """Attention over 512 packed chunks."""
    tokens = None if feature == "plain" else empty(1, dtype=torch.long)
    params = AttentionParams(0.125, None, 50.0 if feature == "all" else None)
    packed, so_far = empty(HEADS, rows, dim, dtype=dtype), state(16, rows, dim, not first)
    return packed_attention.update_launch(so_far, packed, coded(512, chunk, dim, bits), params, None, tokens)


def _attention_cases(extent: str) -> Iterator[Case]:
    half, full = torch.bfloat16, torch.float32
    found = dict.fromkeys([(half, 128, 772, "plain", False)])
    if extent in ("dims", "usual"):
        found[half, 128, 13, "plain", False] = None
        found |= dict.fromkeys((half, dim, 772, "plain", False) for dim in DIMS)
    if extent == "usual":
        found |= dict.fromkeys((half, dim, rows, "plain", False) for dim in DIMS for rows in ROWS)
        found |= dict.fromkeys((half, dim, 772, "all", False) for dim in DIMS)
        found |= dict.fromkeys((full, dim, 96, "all", False) for dim in DIMS)
        found |= dict.fromkeys((half, 128, 772, feature, True) for feature in FEATURES)
        found |= dict.fromkeys((torch.float16, 128, rows, "plain", False) for rows in ROWS)
    elif extent == "every":
        found = dict.fromkeys(itertools.product(DTYPES, DIMS, ROWS, FEATURES, (True, False)))
    for dtype, dim, rows, feature, first in found:
        named = {"dtype": name_of(dtype), "dim": dim, "rows": rows, "feature": feature, "first": first}
        yield Case(update(dtype, dim, rows, feature, first), named)


def _combine_cases(extent: str) -> Iterator[Case]:
    """Joining the splits: the most there are, and one alone; and with learned sinks, of groups of four heads."""
    for dim, splits in ((256, MOST_SPLITS), (80, 1), (512, 7))[: 3 if extent in ("usual", "every") else 1]:
        for logarithm in (True, False):
            output = empty(8, 32) if logarithm else empty(32, 8, dim, dtype=torch.bfloat16)
            launch = attention_state.combine_launch(state(splits, 32, dim, True), output, logarithm)
            yield Case(launch, {"dim": dim, "splits": splits, "logarithm": logarithm, "sinks": "none"})
        for dtype in (torch.bfloat16, torch.float32):
            output = empty(32, 8, dim, dtype=torch.bfloat16)
            launch = attention_state.combine_launch(
                state(splits, 32, dim, True), output, logarithm=False, sinks=empty(32, dtype=dtype)
            )
            yield Case(launch, {"dim": dim, "splits": splits, "logarithm": False, "sinks": name_of(dtype)})


def _score_cases(extent: str) -> Iterator[Case]:
    found = dict.fromkeys([(torch.bfloat16, 128, 772, 8)])
    if extent in ("dims", "usual"):
        found |= dict.fromkeys((torch.bfloat16, dim, 772, 8) for dim in DIMS)
    if extent == "usual":
        found |= dict.fromkeys(
            [(torch.bfloat16, 80, 13, 100), (torch.float32, 256, 13, 16), (torch.float16, 128, 52, 4)]
        )
    elif extent == "every":
        found = dict.fromkeys(itertools.product(DTYPES, DIMS, ROWS, (4, 8, 16, 32, 100)))
    for dtype, dim, rows, chunk in found:
        named = {"dtype": name_of(dtype), "dim": dim, "rows": rows, "chunk": chunk}
        yield Case(scores(dtype, dim, rows, chunk), named)


def _take_cases(extent: str) -> Iterator[Case]:
    half = torch.bfloat16
    found = [(half, 128, 8, 4, 504, 512), (half, 128, 8, 16, 504, 512)]
    if extent == "usual":
        found += [(half, dim, 8, 4, 504, 512) for dim in (80, 256)]
        found += [
            (half, 128, 8, 4, 4096, 2048),
            (torch.float32, 256, 16, 8, 504, 256),
            (torch.float16, 80, 100, 4, 50, 40),
        ]
    elif extent == "every":
        found = list(itertools.product(DTYPES, DIMS, (4, 8, 32, 100), (4, 8, 16), (504,), (256,)))
    for dtype, dim, chunk, bits, slots, count in found:
        named = {"dtype": name_of(dtype), "dim": dim, "chunk": chunk, "bits": bits, "slots": slots, "count": count}
        yield Case(take(dtype, dim, chunk, bits, slots, count), named)


def _packed_cases(extent: str) -> Iterator[Case]:
    """Attention over packed chunks, and their unpacking."""
    half = torch.bfloat16
    found = dict.fromkeys([(half, 128, 772, 8, 4, False, "plain")])
    if extent in ("dims", "usual"):
        found[half, 128, 13, 8, 4, False, "plain"] = None
    if extent == "usual":
        found |= dict.fromkeys((half, dim, rows, 8, 4, False, "plain") for dim in DIMS for rows in ROWS)
        found |= dict.fromkeys((half, 128, rows, 8, 4, True, "all") for rows in ROWS)
        found |= dict.fromkeys(
            [(torch.float32, 256, 96, 8, 4, False, "all"), (torch.float16, 80, 52, 16, 8, False, "all")]
        )
    elif extent == "every":
        found = dict.fromkeys(
            itertools.product(DTYPES, DIMS, ROWS, (4, 8, 32, 100), (4, 8), (True, False), ("plain", "all"))
        )
    for dtype, dim, rows, chunk, bits, first, feature in found:
        named = {"dtype": name_of(dtype), "dim": dim, "rows": rows, "chunk": chunk, "bits": bits}
        launch = packed_update(dtype, dim, rows, chunk, bits, first, feature)
        yield Case(launch, named | {"first": first, "feature": feature})
    for dtype, dim, chunk, bits in dict.fromkeys((case[0], case[1], case[3], case[4]) for case in found):
        if extent == "every" or dim == 128:
            launch = kv_codec.decode_launch(coded(512, chunk, dim, bits), 512, empty(8, 512 * chunk, dim, dtype=dtype))
            yield Case(launch, {"dtype": name_of(dtype), "dim": dim, "chunk": chunk, "bits": bits})


def _recurrent_cases(extent: str) -> Iterator[Case]:
    """Recurrent layers: a step of T tokens over a tree of 193, and the commit of a path. Sizes of Qwen3.6-27B first."""
    found = dict.fromkeys([(torch.bfloat16, 16, 48, 128, 128, 193)])
    if extent == "usual":
        found |= dict.fromkeys([(torch.float16, 16, 32, 128, 128, 13), (torch.float32, 2, 4, 96, 192, 13)])
        found |= dict.fromkeys([(torch.bfloat16, 4, 8, 256, 256, 512), (torch.bfloat16, 4, 4, 64, 64, 13)])
    elif extent == "every":
        found = dict.fromkeys(
            (dtype, 4, 8, dim, dim, rows) for dtype in DTYPES for dim in DIMS[:6] for rows in (13, 193)
        )
    for dtype, keys, values, dim, columns, tokens in found:
        named = {"dtype": name_of(dtype), "dim": dim, "tokens": tokens}
        for launch in recurrent(dtype, keys, values, dim, columns, tokens):
            yield Case(launch, named)


def recurrent(dtype: torch.dtype, keys: int, values: int, dim: int, columns: int, tokens: int) -> list[Launch]:
    """What one recurrent layer launches for T tokens of a tree, and what their commit launches for four layers."""
    rows, taps, channels = 512, 4, 2 * keys * dim + values * columns
    nodes = DeltaNodes(empty(keys, rows, dim), empty(values, rows, columns), *empty(2, values, rows))
    step = NodeStep(
        empty(tokens, rows, dtype=torch.bool), empty(tokens, dtype=torch.long), empty(tokens, taps, dtype=torch.long)
    )
    query, key = empty(2, tokens, keys, dim, dtype=dtype)
    value, queries = empty(tokens, values, columns, dtype=dtype), empty(keys, tokens, dim)
    asked = DeltaTokens(query, key, value, empty(tokens, values), empty(tokens, values, dtype=dtype))
    inputs, state = empty(tokens, channels, dtype=dtype), empty(4, values, dim, columns)
    convolution = Convolution(inputs, empty(channels, taps, dtype=dtype), None, "silu")
    path = [empty(4, keys, rows, dim), empty(4, values, rows, columns), empty(4, values, rows)]
    return [
        delta_rule.convolution_launch(convolution, empty(taps - 1 + rows, channels, dtype=dtype), step, inputs),
        delta_rule.enter_launch(asked, queries, nodes, step),
        delta_rule.rule_launch(asked, queries, state[0], nodes, step, value),
        delta_rule.commit_launch(state, *(part[:, :, :40] for part in path)),
    ]


def _fetch_cases(extent: str) -> Iterator[Case]:
    """Words and bytes out of host memory."""
    for dtype in (torch.int64, torch.uint8):
        yield Case(fetch.fetch_launch(empty(5000, dtype=dtype), empty(5000, dtype=dtype)), {"dtype": name_of(dtype)})


def _int8_cases(extent: str) -> Iterator[Case]:
    """An output embedding in 8 bits: a whole number of blocks, and an odd shape."""
    half = torch.bfloat16
    found = [(half, 13, 248320, 5120), (half, 193, 248320, 5120)]
    if extent in ("usual", "every"):
        found += [(half, 32, 32001, 4096), (torch.float16, 193, 128256, 4096), (torch.float32, 13, 32000, 4100)]
    for dtype, tokens, rows, columns in found:
        codes, output = empty(rows, columns, dtype=torch.int8), empty(tokens, rows, dtype=dtype)
        launch = int8_product.product(empty(tokens, columns, dtype=dtype), codes, empty(rows), output)
        yield Case(launch, {"dtype": name_of(dtype), "tokens": tokens, "words": rows, "hidden": columns})


def wire(dtype: torch.dtype, dim: int, heads: int = HEADS, tokens: int = 4096) -> tuple[Launch, Launch, Launch]:
    """Both launches of encoding a tile, and that of decoding it."""
    format = WireFormat(heads, tokens, dim, dtype)
    kv, coded = empty(2, heads, tokens, dim, dtype=torch.int16), empty(format.bytes, dtype=torch.uint8)
    scratch = empty(format.regions, BLOCK * dim, dtype=torch.uint8)
    return *wire_codec.encode_launches(kv, coded, format, scratch), wire_codec.decode_launch(coded, kv, format)


def _wire_cases(extent: str) -> Iterator[Case]:
    found = dict.fromkeys([(torch.bfloat16, 128)])
    if extent in ("usual", "every"):
        found |= dict.fromkeys((dtype, dim) for dtype in DTYPES[:2] for dim in DIMS)
    for dtype, dim in found:
        for launch in wire(dtype, dim):
            yield Case(launch, {"dtype": name_of(dtype), "dim": dim})
