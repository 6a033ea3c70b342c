"""Every kernel builds for every supported GPU, none of which need be there, and fits a consumer card."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# What a block may have on RTX 30, 40 and 50 cards. (The H100 has more.)
SHARED_MEMORY = 99 * 1024


def compile_kernels(*arguments, **environment):
    """Run the compiler in a process of its own: in this one the kernels may belong to the interpreter."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "offload_triforce.kernels.aot", *arguments]
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=500)


USUAL = [pytest.param(cc, "usual", marks=pytest.mark.slow) for cc in (86, 89, 90, 120)]


@pytest.mark.parametrize(("cc", "extent"), [*((cc, "few") for cc in (86, 89, 90, 120)), *USUAL])
def test_kernels_compile_and_fit(cc, extent):
    run = compile_kernels("--cc", str(cc), "--extent", extent)
    assert run.returncode == 0, run.stderr[-2000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    names = {kernel["name"] for kernel in kernels}
    assert names == {
        *(f"verify_attention._{name}_kernel" for name in ("update", "combine")),
        *(f"chunk_selection._{name}_kernel" for name in ("score", "rank", "assign", "gather")),
        *(f"kv_codec._{name}_kernel" for name in ("encode", "decode", "update")),
    }
    assert all(kernel["cc"] == cc and kernel["shared"] <= SHARED_MEMORY for kernel in kernels)
    if extent == "usual":
        updates = [kernel for kernel in kernels if kernel["name"] == "verify_attention._update_kernel"]
        shapes = {(kernel["dtype"], kernel["dim"]) for kernel in updates}
        assert shapes >= {(dtype, dim) for dtype in ("bfloat16", "float32") for dim in (64, 80, 96, 128, 256)}
        assert {kernel["feature"] for kernel in updates} >= {"plain", "newest", "length", "window", "softcap", "all"}


def test_the_interpreter_does_not_compile():
    run = compile_kernels("--cc", "89", TRITON_INTERPRET="1")
    assert run.returncode != 0
    assert "TRITON_INTERPRET" in run.stderr
