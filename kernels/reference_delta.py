"""Eager twins for recurrent layers: the gated delta rule (arXiv 2412.06464) and its short convolution, over a tree.

A layer of this kind keeps a matrix S per value head. A token with key k, value v, gate g and beta b makes of it
exp(g) S + k u^T, where u = b (v - exp(g) S^T k) is what is new about it, and reads S^T q. A tree of tokens would need
one S per token. It does not: with G the sum of the gates from the root of the tree to a token, and D(i, j) =
exp(G_i - G_j) for an ancestor j of i, all that is needed of the ancestors is their k, u and G:

    u_i = b_i (v_i - exp(G_i) S^T k_i - sum_j D(i, j) (k_i . k_j) u_j)
    o_i = exp(G_i) S^T q_i + sum_j D(i, j) (q_i . k_j) u_j        (here j may be i itself)

with S as it was before the tree: one triangular system, whose exponents are never above 0. Taking a path in leaves
exp(G_a) S + sum_j D(a, j) k_j u_j^T, for its last token a. Arithmetic is float32 whatever the inputs are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from offload_triforce.kernels.types import Convolution, DeltaNodes, DeltaTokens, NodeStep

EPSILON = 1e-6  # in the length of a vector, as the models' own functions have it


def normalised(vectors: Tensor) -> Tensor:
    """Vectors [..., D] of length one, in float32."""
    vectors = vectors.float()
    return vectors * torch.rsqrt((vectors * vectors).sum(-1, keepdim=True) + EPSILON)


def node_step(mask: Tensor, rows: int, taps: int, places: Tensor) -> NodeStep:
    """The step of T new tokens.

    Args:
        mask: bool [T, N], the tokens' ancestors and themselves among N rows, ancestors before descendants.
        rows: N. taps: W, of the convolution. places: int64 [T], the tokens' own rows.
    """
    numbers = torch.arange(rows, device=mask.device)
    nearest = torch.where(mask, numbers, -1).topk(min(taps, rows), dim=1).values
    nearest = F.pad(nearest, (0, taps - nearest.shape[1]), value=-1)
    # Where there are no more ancestors, the text goes on: its newest input first.
    back = torch.arange(taps, device=mask.device) - mask.sum(1, keepdim=True)
    sources = torch.where(nearest >= 0, nearest + taps - 1, taps - 2 - back)
    return NodeStep(mask, places, sources.flip(1))


def tree_convolution(convolution: Convolution, held: Tensor, step: NodeStep) -> Tensor:
    """The convolution of T new tokens along their paths in a tree: [T, C] in the inputs' dtype.

    ``held`` [W - 1 + N, C]: the inputs of the text, then those of the tree, where the new tokens' rows are written.
    """
    weight, bias = convolution.weight, convolution.bias
    held.index_copy_(0, step.places + (weight.shape[1] - 1), convolution.inputs.to(held.dtype))
    output = (held[step.sources].float() * weight.T.float()).sum(1)
    if bias is not None:
        output = output + bias.float()
    output = output.to(convolution.inputs.dtype)
    return F.silu(output) if convolution.activation == "silu" else output


def delta_tree(tokens: DeltaTokens, state: Tensor, nodes: DeltaNodes, step: NodeStep) -> Tensor:
    """The outputs of T new tokens of a tree, [T, Hv, Dv] in the values' dtype; their rows of ``nodes`` are written.

    ``state`` float32 [Hv, Dk, Dv]. Rows of ``nodes`` that no token has hold numbers, whatever these are.
    """
    groups = tokens.value.shape[1] // tokens.key.shape[1]
    query = normalised(tokens.query).transpose(0, 1) * tokens.query.shape[-1] ** -0.5
    key = normalised(tokens.key).transpose(0, 1)
    value, beta = tokens.value.float().transpose(0, 1), tokens.beta.float().T[..., None]
    nodes.keys.index_copy_(1, step.places, key)
    nodes.gates.index_copy_(1, step.places, tokens.gate.float().T)
    nodes.updates.index_fill_(1, step.places, 0.0)
    decay = torch.where(step.seen, nodes.gates[:, None], 0.0).sum(2)
    nodes.decays.index_copy_(1, step.places, decay)
    distance = decay[..., None] - nodes.decays[:, None]
    weights = distance.masked_fill(~step.seen, float("-inf")).exp()

    def products(vectors: Tensor) -> Tensor:
        return (vectors @ nodes.keys.mT).repeat_interleave(groups, 0) * weights

    def read(vectors: Tensor) -> Tensor:
        return decay.exp()[..., None] * (vectors.repeat_interleave(groups, 0) @ state)

    lower = beta * products(key)
    rest = beta * (value - read(key)) - lower @ nodes.updates  # its own rows are zero
    own = lower.index_select(2, step.places)
    nodes.updates.index_copy_(1, step.places, torch.linalg.solve_triangular(own, rest, upper=False, unitriangular=True))
    output = read(query) + products(query) @ nodes.updates
    return output.transpose(0, 1).to(tokens.value.dtype)


def commit_path(state: Tensor, keys: Tensor, updates: Tensor, decays: Tensor) -> None:
    """Take a path of n tokens into the states of L layers, in place.

    ``state`` float32 [L, Hv, Dk, Dv]; ``keys`` [L, Hk, n, Dk], ``updates`` [L, Hv, n, Dv] and ``decays`` [L, Hv, n].
    """
    groups = updates.shape[1] // keys.shape[1]
    end = decays[..., -1:]
    weighted = updates * (end - decays).exp()[..., None]
    state.mul_(end.exp()[..., None])
    state += keys.repeat_interleave(groups, 1).mT @ weighted
