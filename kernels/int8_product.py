"""The product with a matrix of 8-bit codes, in Triton: the twin of ``reference.int8_product``.

For the output embedding, the largest single weight of many models: a step reads it as it lies there, one byte per
weight, and codes become 16-bit numbers in registers, exactly. Blocks of tokens are numbered fastest, so that blocks
which need the same rows of the matrix run at the same time, and it comes from memory once.
"""

# ruff: noqa: ANN001, ANN202 (the parameters of kernels are typed by Triton, at launch)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload_triforce.kernels.launch import Launch, check_rows, run

BLOCK_ROWS, BLOCK_COLUMNS = 64, 64


def int8_product(hidden: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """See ``reference.int8_product``."""
    check_rows(hidden, codes, scale)
    output = torch.empty(hidden.shape[0], codes.shape[0], dtype=hidden.dtype, device=hidden.device)
    if output.numel():
        run(product(hidden, codes, scale, output))
    return output


def product(hidden: Tensor, codes: Tensor, scale: Tensor, output: Tensor) -> Launch:
    """The launch; arguments as of ``int8_product``, and the ``output`` it writes to."""
    tokens, (rows, columns) = hidden.shape[0], codes.shape
    block = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    even = rows % BLOCK_ROWS == 0 and columns % BLOCK_COLUMNS == 0
    arguments = (
        hidden, codes, scale, output, tokens, rows, columns, hidden.stride(0), codes.stride(0), output.stride(0),
        block, BLOCK_ROWS, BLOCK_COLUMNS, even, not isinstance(_product_kernel, triton.JITFunction),
    )  # fmt: skip
    grid = (-(-tokens // block), -(-rows // BLOCK_ROWS), 1)
    return Launch(_product_kernel, grid, arguments, {"num_warps": 4, "num_stages": 3})


@triton.jit(do_not_specialize=["tokens"])
def _product_kernel(
    hidden, codes, scale, output, tokens, rows, columns, hidden_stride, codes_stride, output_stride,
    BLOCK_TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, EVEN: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One block of tokens and of the matrix' rows. ``EVEN``: the matrix is made of whole blocks."""
    token = (tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
    row = (tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK_COLUMNS)
    total = tl.zeros((BLOCK_TOKENS, BLOCK_ROWS), dtype=tl.float32)
    for start in range(0, columns, BLOCK_COLUMNS):
        inner = start + column
        from_hidden = hidden + token[:, None] * hidden_stride + inner[None, :]
        from_codes = codes + row[None, :] * codes_stride + inner[:, None]
        if EVEN:
            states = tl.load(from_hidden, mask=token[:, None] < tokens, other=0.0)
            weights = tl.load(from_codes)
        else:
            states = tl.load(from_hidden, mask=(token[:, None] < tokens) & (inner[None, :] < columns), other=0.0)
            weights = tl.load(from_codes, mask=(row[None, :] < rows) & (inner[:, None] < columns), other=0)
        if INTERPRETED:  # its dot takes the bits of a bfloat16 for an integer
            states = states.to(tl.float32)
        total = tl.dot(states, weights.to(states.dtype), total, input_precision="ieee")
    factors = tl.load(scale + row, mask=row < rows, other=0.0)
    kept = (token[:, None] < tokens) & (row[None, :] < rows)
    tl.store(output + token[:, None] * output_stride + row[None, :], total * factors[None, :], mask=kept)
