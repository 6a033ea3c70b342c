"""Every kernel builds for every supported GPU, none of which need be there, and what the compiler makes of it is good.

The normal run compiles all kernels for one GPU, and one of each kind for another; ``slow`` compiles all for all.
"""

from __future__ import annotations

import functools
import json

import pytest
import torch

triton = pytest.importorskip("triton")

from offload_triforce.kernels import machine_code, tiling, wire_format  # noqa: E402
from tests.without_interpreter import run_compiling  # noqa: E402

# What a block may have on RTX 30, 40 and 50 cards, and a multiprocessor (of which 1 KB per block is CUDA's own). The
# H100 has more.
SHARED_MEMORY, OF_MULTIPROCESSOR = 99 * 1024, 100 * 1024
REGISTERS = 65536  # of a multiprocessor
TARGETS = [
    pytest.param(89, "dims"),
    pytest.param(120, "few"),
    *(pytest.param(cc, "usual", marks=pytest.mark.slow) for cc in (86, 89, 90, 120)),
]
needs_disassembler = pytest.mark.skipif(
    machine_code.disassembler() is None, reason="this Triton comes without cuobjdump, so instructions cannot be counted"
)


def compile_kernels(*arguments, **environment):
    return run_compiling("offload_triforce.kernels.aot", *arguments, **environment)


@functools.cache
def kernels_for(cc, extent):
    run = compile_kernels("--cc", str(cc), "--extent", extent)
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def named(kernels, name):
    return [kernel for kernel in kernels if kernel["name"] == name]


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("cc", "extent"), TARGETS)
def test_kernels_compile_and_fit(cc, extent):
    kernels = kernels_for(cc, extent)
    assert {kernel["name"] for kernel in kernels} == {
        "attention_state._combine_kernel",
        "chunk_scores._score_kernel",
        *(f"chunk_selection._take_{kind}_kernel" for kind in ("packed", "plain")),
        *(f"delta_rule._{kind}_kernel" for kind in ("commit", "convolution", "enter", "rule")),
        "fetch._fetch_kernel",
        "int8_product._product_kernel",
        "kv_codec._decode_kernel",
        "packed_attention._update_kernel",
        "verify_attention._update_kernel",
        *(f"wire_codec._{kind}_kernel" for kind in ("code", "decode", "extend")),
    }
    assert all(kernel["cc"] == cc and kernel["shared"] <= SHARED_MEMORY for kernel in kernels)
    updates = named(kernels, "verify_attention._update_kernel")
    if extent != "few":
        dims = {kernel["dim"] for kernel in updates if kernel["dtype"] == "bfloat16"}
        assert dims == {64, 80, 96, 128, 192, 256, 512}
    if extent == "usual":
        assert {kernel["feature"] for kernel in updates} >= {"plain", "odd", "newest", "length", "window", "softcap"}
        assert {kernel["dtype"] for kernel in updates} == {"bfloat16", "float16", "float32"}


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("cc", "extent"), TARGETS)
def test_nothing_is_spilled(cc, extent):
    """Up to a head dimension of 256, with masks and without. Packed chunks may put a little aside before their loop."""
    slack = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 16  # older ones, a register or two
    for kernel in kernels_for(cc, extent):
        if kernel.get("dim", 0) <= 256:
            packed = kernel["name"].startswith("packed_attention")
            assert kernel["local"] <= slack + (48 if packed and kernel["dim"] > 128 else 0), kernel


@needs_disassembler
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("cc", "extent"), [target for target in TARGETS if target.values[0] != 90])
def test_tensor_cores_are_kept_busy(cc, extent):
    """Instructions per matrix instruction, of 16 x 8 x 16; on the H100 they are larger, and count differently."""
    kernels = kernels_for(cc, extent)
    for kernel in named(kernels, "verify_attention._update_kernel"):
        if kernel["rows"] >= 96 and kernel["feature"] == "plain" and kernel["dtype"] != "float32":
            assert kernel["per_matrix"] <= 7, kernel
            assert kernel["barriers"] <= (2 if kernel["dim"] <= 256 else 8), kernel
    for kernel in named(kernels, "chunk_scores._score_kernel"):
        if kernel["dtype"] != "float32":
            assert kernel["matrix"] >= 8, kernel
    for kernel in named(kernels, "packed_attention._update_kernel"):
        if kernel["dtype"] != "float32" and kernel["dim"] == 128 and kernel["feature"] == "plain":
            assert kernel["matrix"] * kernel["per_matrix"] <= 1600, kernel  # per 64 keys; it was 4442


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("cc", "extent"), [target for target in TARGETS if target.values[0] != 90])
def test_as_many_blocks_fit_a_multiprocessor_as_the_splits_are_made_for(cc, extent):
    for kernel in named(kernels_for(cc, extent), "verify_attention._update_kernel"):
        if kernel["feature"] == "plain":
            itemsize = getattr(torch, kernel["dtype"]).itemsize
            resident = tiling.tiling(kernel["rows"], kernel["dim"], itemsize).resident
            taken = -(-kernel["registers"] // 8) * 8 * 32 * kernel["warps"]
            assert taken * resident <= REGISTERS, kernel
            assert (kernel["shared"] + 1024) * resident <= OF_MULTIPROCESSOR, kernel


@needs_disassembler
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("cc", "extent"), TARGETS)
def test_decoding_a_tile_is_cheap(cc, extent):
    """Instructions per value: half of a coded tile's time on the link is some 800 of them on an RTX 3090."""
    for kernel in named(kernels_for(cc, extent), "wire_codec._decode_kernel"):
        if kernel["dim"] in (64, 128, 256):
            values = wire_format.GROUP * kernel["dim"]  # of a step of the loop
            assert kernel["longest"] * kernel["warps"] * 32 / values <= (140 if kernel["dtype"] == "bfloat16" else 180)


def test_the_interpreter_does_not_compile():
    run = compile_kernels("--cc", "89", TRITON_INTERPRET="1")
    assert run.returncode != 0
    assert "TRITON_INTERPRET" in run.stderr
