"""A product with 8-bit codes: the kernel, its eager twin, and plain arithmetic in float64."""

from __future__ import annotations

import pytest
import torch

from offload_triforce.kernels import ops, reference

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def made(tokens, rows, columns, dtype, device, seed=0):
    chance = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, columns, generator=chance).to(dtype)
    codes = torch.randint(-127, 128, (rows, columns), generator=chance, dtype=torch.int8)
    scale = torch.rand(rows, generator=chance) / 100
    return hidden.to(device), codes.to(device), scale.to(device)


def exact(hidden, codes, scale):
    return hidden.double() @ codes.double().T * scale.double()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [(1, 7, 5), (13, 64, 64), (17, 100, 96), (33, 130, 200), (70, 65, 128), (20, 64, 72)])
def test_both_twins(size, dtype, device, monkeypatch):
    pytest.importorskip("triton")
    arguments = made(*size, dtype, device)
    expected = exact(*arguments)
    for means in ("triton", "torch"):
        monkeypatch.setenv("OFFLOAD_TRIFORCE_KERNELS", means)
        found = ops.int8_product(*arguments)
        assert found.dtype == dtype
        bound = TOLERANCE[dtype] * expected.abs().max()
        torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=bound.item())


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (128, 192), (65, 64), (64, 72), (63, 65)])
@pytest.mark.parametrize(("tokens", "blocks"), [(1, 1), (16, 1), (17, 1), (32, 1), (33, 1), (64, 1), (65, 2)])
def test_only_whole_blocks_are_read_without_looking_where_they_end(tokens, blocks, rows, columns):
    """What lies beyond may belong to nobody. And up to 64 tokens, the matrix is read once."""
    kernel = pytest.importorskip("offload_triforce.kernels.int8_product")
    arguments = made(tokens, rows, columns, torch.float32, "cpu")
    launch = kernel.product(*arguments, torch.empty(tokens, rows))
    said = dict(zip(launch.kernel.arg_names, launch.arguments, strict=True))
    assert said["EVEN"] == ((rows, columns) in {(64, 64), (128, 192)})
    assert launch.grid == (blocks, -(-rows // 64), 1)
    assert said["BLOCK_TOKENS"] * blocks < 2 * max(tokens, 16)


def test_more_rows_than_are_unpacked_at_a_time(monkeypatch):
    monkeypatch.setattr(reference, "INT8_ROWS", 10)
    arguments = made(3, 25, 8, torch.float32, "cpu")
    torch.testing.assert_close(reference.int8_product(*arguments).double(), exact(*arguments), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("means", ["triton", "torch"])
def test_strided_hidden_states_and_none_at_all(means, device, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("OFFLOAD_TRIFORCE_KERNELS", means)
    hidden, codes, scale = made(8, 20, 48, torch.float32, device)
    whole = ops.int8_product(hidden, codes, scale)
    torch.testing.assert_close(ops.int8_product(hidden[::2], codes, scale), whole[::2])
    assert ops.int8_product(hidden[:0], codes, scale).shape == (0, 20)


def test_nothing_is_launched_for_no_tokens_and_rows_have_to_be_contiguous(monkeypatch):
    kernel = pytest.importorskip("offload_triforce.kernels.int8_product")
    monkeypatch.setattr(kernel, "run", lambda launch: pytest.fail("a grid of no blocks is an error on a GPU"))
    hidden, codes, scale = made(8, 20, 48, torch.float32, "cpu")
    assert kernel.int8_product(hidden[:0], codes, scale).shape == (0, 20)
    for bad in ((hidden[:, ::2], codes, scale), (hidden, codes[:, ::2], scale), (hidden, codes, scale[::2])):
        with pytest.raises(ValueError, match="has stride 2"):
            kernel.int8_product(*bad)


def test_rows_that_lie_beyond_four_gigabytes(device, arena, monkeypatch):
    """A vocabulary of 250,000 words of 8,192 numbers: offsets that 32 bits do not hold."""
    pytest.importorskip("triton")
    monkeypatch.setenv("OFFLOAD_TRIFORCE_KERNELS", "triton")
    hidden, codes, scale = made(2, 7, 16, torch.float32, device)
    far = arena(codes, ((1 << 30) + 16, 1))
    torch.testing.assert_close(ops.int8_product(hidden, far, scale), ops.int8_product(hidden, codes, scale))
