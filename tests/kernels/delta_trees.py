"""Random trees and layers for tests of recurrent layers, and the plain recurrence along a path."""

import random
from typing import NamedTuple

import torch
import torch.nn.functional as F

from offload_triforce.kernels.reference_delta import normalised
from offload_triforce.kernels.types import Convolution, DeltaTokens


class Sizes(NamedTuple):
    key_heads: int = 2
    value_heads: int = 4
    key_dim: int = 6
    value_dim: int = 5
    channels: int = 7
    taps: int = 4


def random_parents(nodes, seed, branching=0.5):
    """Each node's parent, -1 for the first: a chain with branches here and there."""
    chance = random.Random(seed)
    return [-1] + [i if chance.random() > branching else chance.randrange(i + 1) for i in range(nodes - 1)]


def paths(parents):
    """Each node's ancestors and itself, first to last."""
    found = []
    for node, parent in enumerate(parents):
        found.append([*(found[parent] if parent >= 0 else []), node])
    return found


def mask_of(parents, kept=None):
    """bool [N, N], whom each node sees; with ``kept``, among and for those nodes alone."""
    lines, nodes = paths(parents), range(len(parents)) if kept is None else kept
    return torch.tensor([[other in lines[node] for other in nodes] for node in nodes])


def draw_tokens(tokens, sizes, seed=0, dtype=torch.float32, device="cpu"):
    """What T tokens ask of a delta rule; gates as models have them, from hardly forgetting to nearly all."""
    chance = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(tokens, *shape, generator=chance)

    key, value = (sizes.key_heads, sizes.key_dim), (sizes.value_heads, sizes.value_dim)
    gate = -(torch.rand(tokens, sizes.value_heads, generator=chance) ** 4) * 8
    parts = draw(*key), draw(*key), draw(*value)
    beta = draw(sizes.value_heads).sigmoid()
    return DeltaTokens(*(part.to(device, dtype) for part in parts), gate.to(device), beta.to(device, dtype))


def draw_convolution(tokens, sizes, seed=0, dtype=torch.float32, device="cpu", activation="silu"):
    chance = torch.Generator().manual_seed(seed)
    shapes = (tokens, sizes.channels), (sizes.channels, sizes.taps), (sizes.channels,)
    return Convolution(*(torch.randn(s, generator=chance).to(device, dtype) for s in shapes), activation)


def take(tokens, rows):
    """Some of the tokens."""
    return DeltaTokens(*(part[list(rows)] for part in tokens))


def plain_rule(tokens, state):
    """Token after token, in float64: the outputs [T, Hv, Dv], and the state after the last."""
    groups = tokens.value.shape[1] // tokens.key.shape[1]
    query, key = (normalised(part).double().repeat_interleave(groups, 1) for part in (tokens.query, tokens.key))
    state, outputs = state.double(), []
    for q, k, v, g, b in zip(
        query, key, tokens.value.double(), tokens.gate.double(), tokens.beta.double(), strict=True
    ):
        state = g.exp()[:, None, None] * state
        update = b[:, None] * (v - (k[:, None] @ state)[:, 0])
        state = state + k[..., None] * update[:, None]
        outputs.append((q[:, None] @ state)[:, 0] * key.shape[-1] ** -0.5)
    return torch.stack(outputs), state


def plain_convolution(convolution, tail, rows):
    """The outputs along a path, [n, C]."""
    whole = torch.cat([tail, convolution.inputs[list(rows)]]).double()
    output = F.conv1d(whole.T[None], convolution.weight.double()[:, None], groups=whole.shape[1])[0].T
    output = output if convolution.bias is None else output + convolution.bias.double()
    return F.silu(output) if convolution.activation == "silu" else output
