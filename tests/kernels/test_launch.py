"""What a pass asks of the driver, told by one that writes it down: counts that do not depend on the machine."""

from __future__ import annotations

import json

import pytest

from tests.without_interpreter import run_compiling

pytest.importorskip("triton")
pytestmark = pytest.mark.xdist_group("compiled")  # by one worker: its one report is for all tests here


@pytest.fixture(scope="module")
def report():
    """Of the program in ``recorder``: it compiles, so the interpreter must not have the kernels."""
    run = run_compiling("tests.kernels.recorder", timeout=300, OFFLOAD_TRIFORCE_KERNELS="triton")
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def test_launches_per_tile(report):
    """Attention; with a refresh, scores, and all that follows from them; and decoding."""
    assert report["launches raw plain"] == 1
    assert report["launches raw refresh"] == 3
    assert report["launches coded plain"] == 2
    assert report["launches coded refresh"] == 4


def test_python_calls_per_tile(report):
    """Of functions in our kernels and in Triton: few enough that a tile's time on the link is longer by far."""
    assert report["calls raw plain"] <= 8
    assert report["calls raw refresh"] <= 16
    assert report["calls coded plain"] <= 16
    assert report["calls coded refresh"] <= 20


def test_a_layer_of_a_drafting_step(report):
    """Packed chunks, the step's own tokens, and the end of the attention."""
    assert report["launches draft"] == 3
    assert report["calls draft"] <= 120


def test_small_tensors_are_read_by_one_launch_each(report):
    """Out of the very memory that the host has written to, into where they are wanted: three blocks of 1,024 words."""
    assert report["fetches"] == [[[3, 1, 1], True, True, 2500]] * 4
    assert report["calls fetch"] <= 20


def test_what_is_bound_is_what_triton_would_have_launched(report):
    """Kernel, grid, and every argument, of a whole pass over coded tiles and of one over raw ones."""
    for bound, triton_way in zip(report["bound"], report["triton"], strict=True):
        assert len(bound) == len(triton_way) > 20
        for ours, theirs in zip(bound, triton_way, strict=True):
            assert ours == theirs


def test_what_is_not_aligned_takes_other_code(report):
    """Attention, scores and choice of four tiles, the last of which begins where no vector load may."""
    *before, last = report["aligned"]
    assert before == [[True] * 3] * 3
    assert last == [False] * 3


def test_what_is_launched_again_keeps_no_tile(report):
    """That which a prefill looks at is half a gigabyte, and is to be free when it is over."""
    assert report["let go"]


def test_memory_that_bound_launches_write_to_stays_theirs(report):
    """Only its address is bound: given back, it would soon be somebody else's."""
    assert report["scratch"]
    assert all(report["scratch"])
