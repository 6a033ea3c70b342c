"""The kernels of recurrent layers against their eager twins, at odd shapes."""

import pytest
import torch

from offload_triforce.kernels import reference_delta
from offload_triforce.kernels.reference_delta import node_step
from offload_triforce.kernels.types import DeltaNodes
from tests.kernels.delta_trees import Sizes, draw_convolution, draw_tokens, mask_of, random_parents, take
from tests.usual import sampled

kernels = pytest.importorskip("offload_triforce.kernels.delta_rule", reason="needs Triton")

TOLERANCES = {torch.float32: (2e-5, 2e-6), torch.bfloat16: (2e-2, 1e-2), torch.float16: (2e-3, 1e-3)}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))
SHAPES = [
    Sizes(1, 1, 16, 16, 33, 2),
    Sizes(2, 4, 12, 10, 130, 4),
    Sizes(1, 3, 24, 40, 128, 3),
    Sizes(2, 2, 129, 17, 7, 5),
]


def empty_nodes(sizes, rows, device):
    """Rows that no token has are NaN, but for what the eager twin needs to be numbers."""
    keys, values = sizes.key_heads, sizes.value_heads
    shapes = (keys, rows, sizes.key_dim), (values, rows, sizes.value_dim), (values, rows), (values, rows)
    return DeltaNodes(*(torch.zeros(shape, device=device) for shape in shapes))


def close(actual, expected, dtype=torch.float32):
    rtol, atol = TOLERANCES[dtype]
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


STEPS = [[1], [5, 1, 3], [17, 20], [40]]


@pytest.mark.parametrize(("dtype", "steps", "sizes"), sampled([*TOLERANCES], STEPS, SHAPES, share=3), ids=str)
def test_trees_in_steps(device, sizes, steps, dtype):
    """Step after step of one tree, behind a state; rows beyond are never read."""
    nodes, room = sum(steps), sum(steps) + 5
    parents, tokens = random_parents(nodes, nodes), draw_tokens(nodes, sizes, nodes, dtype, device)
    state = torch.randn(sizes.value_heads, sizes.key_dim, sizes.value_dim, device=device)
    own, twin = empty_nodes(sizes, room, device), empty_nodes(sizes, room, device)
    for part in own:
        part[:, nodes:] = float("nan")
    start, mask = 0, mask_of(parents).to(device)
    for count in steps:
        end = start + count
        places = torch.arange(start, end, device=device)
        step = node_step(mask[start:end, :end], end, sizes.taps, places)
        now = take(tokens, range(start, end))
        mine = DeltaNodes(*(part[:, :end] for part in own))
        others = DeltaNodes(*(part[:, :end] for part in twin))
        actual = kernels.delta_tree(now, state, mine, step)
        expected = reference_delta.delta_tree(now, state, others, step)
        close(actual, expected, dtype)
        for part, other in zip(mine, others, strict=True):
            close(part, other)
        start = end
    assert all(part[:, nodes:].isnan().all() for part in own)


@DTYPES
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_convolution(device, sizes, activation, dtype):
    nodes, before = 21, 6
    parents, convolution = random_parents(nodes, 3), draw_convolution(nodes, sizes, 1, dtype, device, activation)
    held = torch.full((sizes.taps - 1 + nodes, sizes.channels), float("nan"), dtype=dtype, device=device)
    held[: sizes.taps - 1] = draw_convolution(sizes.taps - 1, sizes, 2, dtype, device).inputs
    twin = held.clone()
    for start, end in ((0, before), (before, nodes)):
        mask = mask_of(parents)[start:end, :end].to(device)
        step = node_step(mask, end, sizes.taps, torch.arange(start, end, device=device))
        now = convolution._replace(inputs=convolution.inputs[start:end], bias=None if start else convolution.bias)
        actual = kernels.tree_convolution(now, held, step)
        close(actual, reference_delta.tree_convolution(now, twin, step), dtype)
    assert torch.equal(held, twin)


@pytest.mark.parametrize("tokens", [1, 15, 16, 33])
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_commit(device, sizes, tokens):
    chance, layers, room = torch.Generator().manual_seed(tokens), 2, 40
    keys, values = sizes.key_heads, sizes.value_heads
    state = torch.randn(layers, values, sizes.key_dim, sizes.value_dim, generator=chance).to(device)
    parts = [torch.full((layers, keys, room, sizes.key_dim), float("nan"))]
    parts += [torch.full((layers, values, room, sizes.value_dim), float("nan"))]
    parts += [torch.full((layers, values, room), float("nan"))]
    for part in parts:
        part[:, :, :tokens] = torch.randn(part[:, :, :tokens].shape, generator=chance)
    parts[2] = -parts[2].abs().cumsum(2)
    parts = [part.to(device)[:, :, :tokens] for part in parts]
    twin = state.clone()
    kernels.commit_path(state, *parts)
    reference_delta.commit_path(twin, *parts)
    close(state, twin)
