"""Weights as plain numbers: bytes by part, dtype and quantisation, by hand."""

import pytest

from offload_triforce.errors import InputError
from offload_triforce.model.counts import (
    Counts,
    Matrix,
    Part,
    check_head_quantization,
    check_quantization,
    packing_options,
)

PART = Part(plain=10, packed=640, rows=20, blocks=10)
MATRICES = (Matrix(8, 32, 2), Matrix(4, 32, 1))
COUNTS = Counts(2, PART, Part(plain=100), 50, 64, Part(plain=1000), 0.25, MATRICES, head_rows=5)


@pytest.mark.parametrize(
    ("quantize", "size"), [(None, 2 * 650), ("nf4", 2 * 10 + 320 + 10 + 4), ("int8", 2 * 10 + 640 + 4 * 20)]
)
def test_a_part_in_16_bits(quantize, size):
    assert PART.size(2, quantize) == size
    assert PART._replace(extra=7).size(2, quantize) == size + 7


def test_all_parts_together():
    counts = COUNTS
    plain, packed = counts.weights(2, None), counts.weights(2, "nf4")
    assert plain.parameters == packed.parameters == 650 + 100 + 1000
    assert plain.total == 2 * 1750
    tables = 3 * 4 * (16 + 256 + 1)
    assert packed.total == 354 + tables + 200 + 2000
    assert (plain.layer, packed.layer) == (650, (354 + tables) / 2)
    assert plain.experts == packed.experts == 1000
    assert (plain.unpacked, packed.unpacked) == ((), MATRICES)
    assert (plain.largest, packed.largest) == (0, 128)
    assert (plain.head, plain.head_parameters, plain.expert_share) == (100, 50, 0.25)


def test_a_packed_head():
    """50 weights in 5 rows: a byte each, and 4 per row."""
    plain, packed, both = COUNTS.weights(2, None), COUNTS.weights(2, None, "int8"), COUNTS.weights(2, "nf4", "int8")
    assert (packed.head, plain.total - packed.total) == (50 + 20, 100 - 70)
    assert (packed.largest, both.largest) == (0, 128)
    assert both.total == COUNTS.weights(2, "nf4").total - 30
    assert packed.parameters == plain.parameters


def test_heads_that_are_not_packed():
    check_head_quantization("int8")
    check_head_quantization(None, tied=True)
    with pytest.raises(InputError, match="'nf4' of the output head; use int8"):
        check_head_quantization("nf4")
    with pytest.raises(InputError, match="more memory and not less; leave --quantize-head out"):
        check_head_quantization("int8", tied=True)
    assert packing_options("nf4", "int8") == "--quantize nf4 --quantize-head int8"
    assert packing_options(None, None) == ""


def test_quantisations_are_known():
    for quantize in (None, "nf4", "int8"):
        check_quantization(quantize)
    with pytest.raises(InputError, match="unknown quantisation 'q4'; use nf4 or int8"):
        check_quantization("q4")
