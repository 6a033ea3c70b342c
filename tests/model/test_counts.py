"""Weights as plain numbers: bytes by part, dtype and quantisation, by hand."""

import pytest

from offload_triforce.errors import InputError
from offload_triforce.model.counts import Counts, Part, check_quantization

PART = Part(plain=10, packed=640, rows=20, blocks=10)


@pytest.mark.parametrize(
    ("quantize", "size"), [(None, 2 * 650), ("nf4", 2 * 10 + 320 + 4 * 10), ("int8", 2 * 10 + 640 + 4 * 20)]
)
def test_a_part_in_16_bits(quantize, size):
    assert PART.size(2, quantize) == size
    assert PART._replace(extra=7).size(2, quantize) == size + 7


def test_all_parts_together():
    counts = Counts(2, PART, Part(plain=100), head=50, largest=64, experts=Part(plain=1000), expert_share=0.25)
    plain, packed = counts.weights(2, None), counts.weights(2, "nf4")
    assert plain.parameters == packed.parameters == 650 + 100 + 1000
    assert plain.total == 2 * 1750
    assert packed.total == 380 + 200 + 2000
    assert (plain.layer, packed.layer) == (650, 190)
    assert plain.experts == packed.experts == 1000
    assert (plain.unpacked, packed.unpacked) == (0, 2 * 2 * 640 / 2)
    assert (plain.largest, packed.largest) == (0, 128)
    assert (plain.head, plain.head_parameters, plain.expert_share) == (100, 50, 0.25)


def test_quantisations_are_known():
    for quantize in (None, "nf4", "int8"):
        check_quantization(quantize)
    with pytest.raises(InputError, match="unknown quantisation 'q4'; use nf4 or int8"):
        check_quantization("q4")
