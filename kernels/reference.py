"""Eager twins: every operation of the hot path in plain torch, on any device.

Shapes use T new tokens (queries), n cached tokens, H query heads, K KV heads, G = H / K query heads per KV
head, D the head dimension, C chunks. Queries are *packed*: the G query heads of one KV head become rows of
one matrix, [K, G*T, D] with row g*T + t, so that KV heads are never repeated. Arithmetic is float32
whatever the dtype of the inputs, as flash attention accumulates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right


class PartialAttention(NamedTuple):
    """Softmax attention over the keys seen so far, carried from tile to tile (online softmax).

    ``maximum`` [K, G*T] is the largest score, ``total`` [K, G*T] the sum of exp(score - maximum) and
    ``weighted`` [K, G*T, D] the same sum weighted with the values. All float32.
    """

    maximum: Tensor
    total: Tensor
    weighted: Tensor


def pack_queries(query: Tensor, kv_heads: int) -> Tensor:
    """[H, T, D] -> [K, G*T, D]. Query heads of one KV head are neighbours, so this is a reshape."""
    heads, tokens, dim = query.shape
    return query.reshape(kv_heads, heads // kv_heads * tokens, dim)


def causal_mask(new_tokens: int, total: int, window: int | None = None, device: torch.device | None = None) -> Tensor:
    """Which of ``total`` keys each of the ``new_tokens`` last tokens may see: bool [T, total].

    Key j is visible to the query at position i when j <= i and, with a sliding window, j > i - window.
    """
    rows = torch.arange(total - new_tokens, total, device=device)[:, None]
    columns = torch.arange(total, device=device)[None, :]
    visible = columns <= rows
    return visible if window is None else visible & (columns > rows - window)


def attention_start(packed: Tensor) -> PartialAttention:
    """The state before any key: no mass, and a maximum that every score exceeds."""
    rows = packed.shape[:2]
    lowest = torch.finfo(torch.float32).min
    return PartialAttention(
        torch.full(rows, lowest, dtype=torch.float32, device=packed.device),
        torch.zeros(rows, dtype=torch.float32, device=packed.device),
        torch.zeros(packed.shape, dtype=torch.float32, device=packed.device),
    )


def attention_update(
    state: PartialAttention,
    packed: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    mask: Tensor | None = None,
) -> PartialAttention:
    """Take the keys and values of one tile in: ``key`` and ``value`` are [K, n, D].

    ``mask`` (bool [T, n]) tells which keys each query sees; None means all of them.
    """
    scores = torch.matmul(packed.float(), key.float().transpose(1, 2)) * scaling
    if mask is not None:
        groups = packed.shape[1] // mask.shape[0]
        scores = scores.masked_fill(~mask.repeat(groups, 1), float("-inf"))
    maximum = torch.maximum(state.maximum, scores.amax(dim=-1))
    weights = torch.exp(scores - maximum[..., None])
    decay = torch.exp(state.maximum - maximum)
    return PartialAttention(
        maximum,
        state.total * decay + weights.sum(dim=-1),
        state.weighted * decay[..., None] + torch.matmul(weights, value.float()),
    )


def attention_finish(state: PartialAttention, heads: int, dtype: torch.dtype) -> Tensor:
    """Normalise and unpack: [H, T, D] in ``dtype``."""
    output = state.weighted / state.total[..., None]
    return output.reshape(heads, -1, output.shape[-1]).to(dtype)


def prefill_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    """Attention of the last T of n tokens over all n: query [H, T, D], key and value [K, n, D] -> [H, T, D].

    torch's own fused kernels: the causal mask is aligned to the lower right corner, and keys that a
    sliding window hides from every query are not read.
    """
    tokens = query.shape[1]
    if window is not None:
        reach = min(key.shape[1], tokens + window - 1)
        key, value = key[:, -reach:], value[:, -reach:]
        mask = causal_mask(tokens, reach, window, query.device)
    else:
        mask = causal_lower_right(tokens, key.shape[1])
    gqa = query.shape[0] != key.shape[0]
    if gqa and query.is_cuda and query.dtype == torch.float32:
        # No fused CUDA kernel takes grouped heads in float32, and the fallback would hold all scores at once.
        group = query.shape[0] // key.shape[0]
        key, value, gqa = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0), False
    return F.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=mask, scale=scaling, enable_gqa=gqa
    )[0]


def chunk_means(key: Tensor, chunk: int) -> Tensor:
    """Mean key of each chunk: [K, C*chunk, D] -> [K, C, D], float32."""
    heads, tokens, dim = key.shape
    return key.float().reshape(heads, tokens // chunk, chunk, dim).mean(dim=2)


def chunk_scores(packed: Tensor, means: Tensor, scaling: float, baseline: Tensor) -> Tensor:
    """How much the queries of the block want each chunk: [K, C].

    A query's wish for a chunk is exp(q . mean key - baseline), with ``baseline`` [K, G*T] that query's
    log-sum-exp over keys that are always attended. The wishes of all rows, hence of the whole GQA group, add up.
    The baseline is fixed before the first tile streams by, which makes scores of different tiles comparable
    without a second look at any of them.
    """
    wishes = torch.matmul(packed.float(), means.transpose(1, 2)) * scaling - baseline[..., None]
    return torch.logsumexp(wishes, dim=1)


class TopChunks(NamedTuple):
    """The chunks to take in: row i says that ``chunk[i]`` of head ``head[i]`` goes to slot ``slot[i]``."""

    head: Tensor
    slot: Tensor
    chunk: Tensor
    scores: Tensor


def merge_top_chunks(held: Tensor, offered: Tensor) -> TopChunks:
    """One step of a streaming top-k: best k of k held and C offered chunks, losers' slots reused.

    ``held`` [K, k] and ``offered`` [K, C] are scores, -inf marks an empty slot or a chunk that is not on
    offer. Chunks that stay keep their slot, so only those that enter have to be copied; empty slots fill from the
    lowest up. The returned ``scores`` [K, k] are those of the new holding.
    """
    slots = held.shape[1]
    best, index = torch.cat([held, offered], dim=1).topk(slots, dim=1)
    wanted = best > float("-inf")
    stays = torch.zeros_like(held, dtype=torch.bool)
    kept_head, kept_column = ((index < slots) & wanted).nonzero(as_tuple=True)
    stays[kept_head, index[kept_head, kept_column]] = True
    head, column = ((index >= slots) & wanted).nonzero(as_tuple=True)
    entering = torch.bincount(head, minlength=held.shape[0])
    free_rank = (~stays).cumsum(dim=1)
    taken = ~stays & (free_rank <= entering[:, None])
    slot = taken.nonzero(as_tuple=True)[1]
    scores = torch.where(stays, held, float("-inf"))
    scores[head, slot] = best[head, column]
    return TopChunks(head, slot, index[head, column] - slots, scores)
