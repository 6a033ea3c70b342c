"""Which products write 4-bit weights out first: our rule against that of the bitsandbytes which is installed."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_triforce.machine.cards import CARDS
from offload_triforce.model.counts import Matrix
from offload_triforce.planner.unpacking import is_fused, unpacked_numbers

SIZES = st.one_of(st.integers(1, 500).map(lambda n: 64 * n), st.sampled_from([1024, 2048, 4096, 5120, 14336, 17408]))
CHIPS = sorted({(card.cc, card.sms) for card in CARDS})
DTYPES = {2: torch.bfloat16, 4: torch.float32}


@pytest.fixture(scope="module")
def theirs():
    """bitsandbytes' own rule, taken from its source: the module as a whole wants a CUDA library."""
    library = importlib.util.find_spec("bitsandbytes")
    if library is None:
        pytest.skip("needs bitsandbytes")
    source = (Path(library.submodule_search_locations[0]) / "backends" / "cuda" / "ops.py").read_text()
    rule = next(part for part in ast.parse(source).body if getattr(part, "name", "") == "_gemm_4bit_use_custom_cuda")
    rule.decorator_list = []
    (few,) = re.findall(r"^_GEMM_4BIT_CUSTOM_FLOOR_M = (\d+)$", source, re.MULTILINE)
    many = re.search(r"version\.hip is None:.*?_gemm_4bit_custom_max_m = (\d+)$", source, re.MULTILINE | re.DOTALL)[1]
    names = {"torch": torch, "_GEMM_4BIT_CUSTOM_FLOOR_M": int(few), "_gpu_dispatch_props": lambda chip: chip}
    exec(compile(ast.Module([rule], []), "bitsandbytes", "exec"), names)

    def fused(tokens, rows, columns, itemsize, cc, sms):
        if tokens > int(many) or columns % 64:
            return False
        return names["_gemm_4bit_use_custom_cuda"]((sms, *divmod(cc, 10)), DTYPES[itemsize], tokens, rows, columns)

    return fused


@settings(max_examples=1000, deadline=None)
@given(
    tokens=st.one_of(st.integers(1, 40), st.integers(1, 600), st.sampled_from([128, 193, 320, 384, 512, 1536, 1537])),
    rows=SIZES,
    columns=SIZES,
    itemsize=st.sampled_from([2, 2, 2, 4]),
    chip=st.sampled_from(CHIPS),
)
def test_our_rule_is_that_of_the_library(theirs, tokens, rows, columns, itemsize, chip):
    assert is_fused(tokens, rows, columns, itemsize, *chip) == theirs(tokens, rows, columns, itemsize, *chip)


@pytest.mark.parametrize("chip", CHIPS)
def test_around_every_limit(theirs, chip):
    """All numbers of tokens at which one of the two rules changes its mind, for the shapes of well-known models."""
    shapes = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (5120, 5120), (17408, 5120), (5120, 17408)]
    shapes += [
        (512, 3584),
        (18944, 3584),
        (3584, 18944),
        (576, 1536),
        (1536, 576),
        (192, 576),
        (6144, 2048),
        (96, 32),
        (2048, 512),
        # Right at a limit of blocks, and rows that are no whole number of them.
        (3072, 4096),
        (3072, 2048),
        (5120, 512),
        (100, 128),
    ]
    for rows, columns in shapes:
        for tokens in (*range(1, 521), 1535, 1536, 1537):
            said = is_fused(tokens, rows, columns, 2, *chip)
            assert said == theirs(tokens, rows, columns, 2, *chip), (tokens, rows, columns)


def test_what_is_written_out_by_hand():
    """A RTX 4090 reads (14336, 4096) as it is up to 128 tokens: 224 blocks of 64 rows on 128 multiprocessors."""
    matrices = (Matrix(14336, 4096, 3), Matrix(4096, 4096, 2))
    assert unpacked_numbers(matrices, 4, 2, 89, 128) == 0
    assert unpacked_numbers(matrices, 8, 2, 89, 128) == 0
    assert unpacked_numbers(matrices, 12, 2, 89, 128) == 2 * 4096 * 4096
    assert unpacked_numbers(matrices, 129, 2, 89, 128) == 3 * 14336 * 4096 + 2 * 4096 * 4096
    assert unpacked_numbers(matrices, 8, 4, 89, 128) == 3 * 14336 * 4096 + 2 * 4096 * 4096
