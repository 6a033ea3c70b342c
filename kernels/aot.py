"""Compile every kernel ahead of time, for a GPU that need not be there: ``python -m offload_triforce.kernels.aot``.

It shows that the kernels build for a compute capability, and how much shared memory a block of each takes: RTX cards
of the 30, 40 and 50 series give 99 KB, and refuse a kernel that wants more only when it is launched.
The arguments are those of a real launch, made with tensors that have shapes but no memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from offload_triforce.kernels import chunk_selection, kv_codec, verify_attention
from offload_triforce.kernels.types import AttentionParams, ChunkSelection, CodedChunks, TreeMask

SHARED_MEMORY = 101376
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DIMS = (64, 80, 96, 128, 256)
FEATURES = ("plain", "newest", "length", "window", "positions", "softcap", "all")

Launch = tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]


class Compiled(NamedTuple):
    """A kernel that was built: its name, what it was built for, and the bytes of shared memory per block."""

    name: str
    parameters: dict[str, Any]
    shared: int
    binary: Any


class Case(NamedTuple):
    """What to build: a kernel, a description, and the launch."""

    kernel: triton.JITFunction
    parameters: dict[str, Any]
    launch: Launch


def compiled(cc: int, extent: str = "usual") -> Iterator[Compiled]:
    """The kernels for compute capability ``cc``, such as 89.

    Args:
        cc: ten times the major number plus the minor.
        extent: "few", one of each kind; "usual", each dtype and head dimension and each feature; "every", all of them
            combined, which takes minutes.
    """
    if not isinstance(verify_attention._update_kernel, triton.JITFunction):
        raise RuntimeError("Triton's interpreter does not compile: unset TRITON_INTERPRET")
    makers = (_update_cases, _combine_cases, _score_cases, _select_cases, _codec_cases)
    for kernel, parameters, launch in itertools.chain.from_iterable(make(extent) for make in makers):
        binary = compile_launch(kernel, launch, cc)
        name = f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"
        yield Compiled(name, parameters, binary.metadata.shared, binary)


def compile_launch(kernel: triton.JITFunction, launch: Launch, cc: int) -> Any:
    """Build what launching ``kernel`` with these arguments on a GPU of compute capability ``cc`` would build."""
    _, arguments, options = launch
    signature, constants, attributes = {}, {}, {}
    for place, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=True)):
        kind, hints = _specialise(parameter, value)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
        elif hints:
            attributes[place,] = hints
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", cc, 32), options=options)


def _specialise(parameter: Any, value: Any) -> tuple[str, list[list[Any]]]:
    """The type of an argument and what is assumed of its value, by the rules of Triton's launcher."""
    aligned = [["tt.divisibility", 16]]
    if parameter.is_constexpr or value is None:
        return "constexpr", []
    if isinstance(value, Tensor):
        return "*" + triton.runtime.jit.type_canonicalisation_dict[_name(value.dtype)], aligned
    if isinstance(value, float):
        return "fp32", []
    fixed = parameter.do_not_specialize
    if value == 1 and not fixed:
        return "constexpr", []
    return ("i32" if -(2**31) <= value < 2**31 else "i64"), aligned if value % 16 == 0 and not fixed else []


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _update_cases(extent: str) -> Iterator[Case]:
    """Updates: of many rows with all features, where memory is tightest, and each feature alone for one shape."""
    half, full = torch.bfloat16, torch.float32
    shapes = [(half, 128, 96), (full, 256, 96)]
    if extent == "usual":
        shapes += [*itertools.product((half, full), DIMS, (96,)), (torch.float16, 128, 96), (half, 256, 13)]
        shapes += itertools.product((half, full), (128,), (13,))
    elif extent == "every":
        shapes = list(itertools.product((half, torch.float16, full), DIMS, (13, 32, 96)))
    cases = dict.fromkeys((*shape, "all", False) for shape in shapes)
    if extent == "usual":
        cases |= dict.fromkeys(
            (half, 128, 96, feature, first) for feature, first in zip(FEATURES[:-1], (True, False) * 3, strict=True)
        )
    elif extent == "every":
        cases = {(*shape, feature, first) for shape in shapes for feature in FEATURES for first in (True, False)}
    for dtype, dim, rows, feature, first in cases:
        named = {"dtype": _name(dtype), "dim": dim, "rows": rows, "feature": feature, "first": first}
        yield Case(verify_attention._update_kernel, named, _update_launch(dtype, dim, rows, feature, first))


def _combine_cases(extent: str) -> Iterator[Case]:
    """Joining the splits: the most there are, and one alone."""
    for dim, splits in ((256, verify_attention.MOST_SPLITS), (80, 1))[: 1 if extent == "few" else 2]:
        state = _state(splits, 32, dim, True)
        for logarithm in (True, False):
            output = _empty(8, 32) if logarithm else _empty(32, 8, dim, dtype=torch.bfloat16)
            launch = verify_attention.combine_arguments(state, output, logarithm)
            yield Case(verify_attention._combine_kernel, {"dim": dim, "splits": splits, "logarithm": logarithm}, launch)


def _state(splits: int, rows: int, dim: int, started: bool) -> verify_attention.SplitAttention:
    shape = (splits, 8, rows)
    return verify_attention.SplitAttention(_empty(*shape), _empty(*shape), _empty(*shape, dim), started)


def _update_launch(dtype: torch.dtype, dim: int, rows: int, feature: str, first: bool) -> Launch:
    """One tile of 4096 keys, seen by ``rows`` packed rows of 8 KV heads."""
    key, value = _empty(2, 8, 4096, dim, dtype=dtype)
    tree_mask = None
    if feature not in ("plain", "softcap"):
        length = _empty(1, dtype=torch.long) if feature in ("length", "all") else None
        positions = _empty(rows, dtype=torch.long) if feature in ("positions", "all") else None
        tree_mask = TreeMask(_empty(rows, 64, dtype=torch.bool), positions, length)
    window = 1000 if feature in ("window", "positions", "all") else None
    params = AttentionParams(0.125, window, 50.0 if feature in ("softcap", "all") else None)
    state = _state(16, rows, dim, not first)
    return verify_attention.update_arguments(state, _empty(8, rows, dim, dtype=dtype), key, value, params, tree_mask)


def _score_cases(extent: str) -> Iterator[Case]:
    """Scores of usual and odd chunks, and the copy of those chosen."""
    shapes = [(torch.bfloat16, 128, 8), (torch.bfloat16, 80, 100), (torch.float32, 256, 16)]
    if extent == "every":
        shapes = list(itertools.product(DTYPES, DIMS, (4, 8, 16, 32, 100)))
    for dtype, dim, chunk in shapes[:1] if extent == "few" else shapes:
        key, held = _empty(8, 24 * chunk, dim, dtype=dtype), _empty(8, 24, dtype=torch.bool)
        named = {"dtype": _name(dtype), "dim": dim, "chunk": chunk}
        tensors = _empty(8, 64, dim, dtype=dtype), key
        launch = chunk_selection.score_arguments(*tensors, chunk, 0.125, _empty(8, 64), held, _empty(8, 24))
        yield Case(chunk_selection._score_kernel, named, launch)
        source, slots = _empty(8, 512, dtype=torch.long), _empty(2, 8, 512, chunk, dim, dtype=dtype)
        launch = chunk_selection.gather_arguments(source, _empty(2, *key.shape, dtype=dtype), slots)
        yield Case(chunk_selection._gather_kernel, named, launch)


def _select_cases(extent: str) -> Iterator[Case]:
    """The choice: at the largest size, and at a usual one."""
    for slots, count in ((4096, 2048), (504, 256))[: 1 if extent == "few" else 2]:
        held = _empty(8, 16385, dtype=torch.bool)
        selection = ChunkSelection(_empty(8, slots), _empty(8, slots, dtype=torch.long), held)
        source, scratch = _empty(8, slots, dtype=torch.long), _empty(8, slots + 2 * count, dtype=torch.int32)
        launches = chunk_selection.select_arguments(selection, _empty(8, count), 512, source, scratch)
        for kernel, launch in zip(
            (chunk_selection._rank_kernel, chunk_selection._assign_kernel), launches, strict=True
        ):
            yield Case(kernel, {"slots": slots, "count": count}, launch)


def _codec_cases(extent: str) -> Iterator[Case]:
    """Packing and unpacking of chunks, and attention over them: the largest head dimension, and usual ones."""
    shapes = [(torch.bfloat16, 128, 8, 4), (torch.float32, 256, 8, 4), (torch.float16, 80, 16, 8)]
    if extent == "every":
        shapes = list(itertools.product(DTYPES, DIMS, (4, 8, 32, 100), (4, 8)))
    for dtype, dim, chunk, bits in shapes[:1] if extent == "few" else shapes:
        coded = _coded(8, 512, chunk, dim, bits)
        named = {"dtype": _name(dtype), "dim": dim, "chunk": chunk, "bits": bits}
        launch = kv_codec.encode_arguments(
            _empty(8, 512, dtype=torch.long), _empty(2, 8, 16 * chunk, dim, dtype=dtype), coded
        )
        yield Case(kv_codec._encode_kernel, named, launch)
        yield Case(kv_codec._decode_kernel, named, kv_codec.decode_arguments(coded, 512, _empty(8, 512 * chunk, dim)))
        params, tokens = AttentionParams(0.125, None, 50.0), _empty(1, dtype=torch.long)
        for rows, first in ((96, True), (13, False)):
            packed, state = _empty(8, rows, dim, dtype=dtype), _state(16, rows, dim, not first)
            launch = kv_codec.update_arguments(state, packed, coded, params, None, tokens)
            yield Case(kv_codec._update_kernel, named | {"rows": rows, "first": first}, launch)


def _coded(heads: int, slots: int, chunk: int, dim: int, bits: int) -> CodedChunks:
    codes = [_empty(heads, slots, chunk, dim * bits // 8, dtype=torch.uint8) for _ in range(2)]
    ranges = [_empty(heads, slots, dim, dtype=torch.uint8) for _ in range(2)]
    tokens = [_empty(heads, slots, chunk, dtype=torch.float16) for _ in range(2)]
    return CodedChunks(*codes, *ranges, *tokens, *(_empty(heads, dim) for _ in range(2)))


def main() -> None:
    """Print one line of JSON per kernel; fail if one takes more shared memory than a consumer card has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cc", type=int, nargs="+", default=[86, 89, 90, 120], help="compute capabilities")
    parser.add_argument("--extent", choices=["few", "usual", "every"], default="usual", help="how many variants")
    arguments = parser.parse_args()
    too_large = False
    for cc in arguments.cc:
        for name, parameters, shared, _ in compiled(cc, arguments.extent):
            print(json.dumps({"cc": cc, "name": name, **parameters, "shared": shared}), flush=True)
            too_large |= shared > SHARED_MEMORY
    sys.exit(int(too_large))


if __name__ == "__main__":
    main()
