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


class Rule(NamedTuple):
    """How a model turns a query and a key into a score: scaling, sliding window in tokens, logit soft-capping."""

    scaling: float
    window: int | None = None
    softcap: float | None = None


class Newest(NamedTuple):
    """What is special about the newest of n keys: they are the queries' own tokens, which do not all see each other.

    ``mask`` (bool [T, M]) tells which of the last M keys each query sees; keys before them are seen by all, as far
    as a window reaches. ``positions`` (int64 [T]), for windows over a tree, are the queries' places on the axis of
    the keys; without it, query t is the key n - T + t. ``length`` (int64, one element, on the device) is n for a
    buffer that is longer than its content: what lies behind does not exist.
    """

    mask: Tensor
    positions: Tensor | None = None
    length: Tensor | None = None


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
    state: PartialAttention, packed: Tensor, key: Tensor, value: Tensor, rule: Rule, newest: Newest | None = None
) -> PartialAttention:
    """Take the keys and values of one tile in: ``key`` and ``value`` are [K, n, D].

    Without ``newest`` every query sees every key, whatever the rule's window.
    """
    scores = torch.matmul(packed.float(), key.float().transpose(1, 2)) * rule.scaling
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    if newest is not None:
        mask = visible_keys(key.shape[1], newest, rule.window)
        scores = scores.masked_fill(~mask.repeat(packed.shape[1] // mask.shape[0], 1), float("-inf"))
    maximum = torch.maximum(state.maximum, scores.amax(dim=-1))
    weights = torch.exp(scores - maximum[..., None])
    decay = torch.exp(state.maximum - maximum)
    return PartialAttention(
        maximum,
        state.total * decay + weights.sum(dim=-1),
        state.weighted * decay[..., None] + torch.matmul(weights, value.float()),
    )


def visible_keys(keys: int, newest: Newest, window: int | None) -> Tensor:
    """Which of the keys each query sees: bool [T, keys]."""
    mask, device = newest.mask, newest.mask.device
    tokens, masked = mask.shape
    end = keys if newest.length is None else newest.length
    column = torch.arange(keys, device=device)
    place = column - end + masked  # in the mask
    visible = (place < masked) & (mask[:, place.clamp(0, masked - 1)] | (place < 0))
    if window is not None:
        rows = newest.positions
        if rows is None:
            rows = torch.arange(tokens, device=device) + (end - tokens)
        visible &= column > rows[:, None] - window
    return visible


def attention_logsumexp(state: PartialAttention) -> Tensor:
    """Log-sum-exp of the scores so far, per query: [K, G*T]."""
    return state.maximum + state.total.log()


def attention_finish(state: PartialAttention, heads: int, dtype: torch.dtype) -> Tensor:
    """Normalise and unpack: [H, T, D] in ``dtype``."""
    output = state.weighted / state.total[..., None]
    return output.reshape(heads, -1, output.shape[-1]).to(dtype)


def prefill_attention(query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
    """Attention of the last T of n tokens over all n: query [H, T, D], key and value [K, n, D] -> [H, T, D].

    torch's own fused kernels: the causal mask is aligned to the lower right corner, and keys that a
    sliding window hides from every query are not read. They know no soft-capping: that goes part by part.
    """
    tokens = query.shape[1]
    if rule.window is not None:
        reach = min(key.shape[1], tokens + rule.window - 1)
        key, value = key[:, -reach:], value[:, -reach:]
    if rule.softcap is not None:
        return _capped_attention(query, key, value, rule)
    if rule.window is not None:
        mask = causal_mask(tokens, key.shape[1], rule.window, query.device)
    else:
        mask = causal_lower_right(tokens, key.shape[1])
    gqa = query.shape[0] != key.shape[0]
    if gqa and query.is_cuda and (query.dtype == torch.float32 or rule.window is not None):
        # No fused CUDA kernel takes grouped heads in float32, or with a mask: the fallback holds all scores at once.
        group = query.shape[0] // key.shape[0]
        key, value, gqa = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0), False
    return F.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=mask, scale=rule.scaling, enable_gqa=gqa
    )[0]


def _capped_attention(query: Tensor, key: Tensor, value: Tensor, rule: Rule, part: int = 1024) -> Tensor:
    """The same with soft-capped scores, ``part`` keys at a time."""
    tokens, total = query.shape[1], key.shape[1]
    packed = pack_queries(query, key.shape[0])
    state = attention_start(packed)
    own = torch.arange(total - tokens, total, device=query.device)[:, None]
    for start in range(0, total, part):
        stop = min(start + part, total)
        column = torch.arange(start, stop, device=query.device)
        mask = column <= own if rule.window is None else (column <= own) & (column > own - rule.window)
        state = attention_update(
            state, packed, key[:, start:stop], value[:, start:stop], rule._replace(window=None), Newest(mask)
        )
    return attention_finish(state, query.shape[0], query.dtype)


def chunk_scores(
    packed: Tensor, key: Tensor, chunk: int, scaling: float, baseline: Tensor, held: Tensor | None = None
) -> Tensor:
    """How much the queries of the block want each chunk of ``key`` [K, C*chunk, D]: float32 [K, C].

    A query's wish for a chunk is exp(q . mean key - baseline), with ``baseline`` [K, G*T] that query's
    log-sum-exp over keys that are always attended. The wishes of all rows, hence of the whole GQA group, add up.
    The baseline is fixed before the first tile streams by, which makes scores of different tiles comparable
    without a second look at any of them. Chunks that are ``held`` (bool [K, C]) are not on offer: -inf.
    """
    heads, tokens, dim = key.shape
    means = key.float().reshape(heads, tokens // chunk, chunk, dim).mean(dim=2)
    wishes = torch.matmul(packed.float(), means.transpose(1, 2)) * scaling - baseline[..., None]
    scores = torch.logsumexp(wishes, dim=1)
    return scores if held is None else scores.masked_fill(held, float("-inf"))


class Choice(NamedTuple):
    """The chunks that each of K KV heads holds in its k slots, and how much it wants them.

    ``scores`` [K, k] float32, -inf for an empty slot. ``chunks`` [K, k] int64: their numbers, -1 for an empty
    slot. ``held`` [K, all chunks + 1] bool: the same as a set; its last column is nobody's, and may hold anything.
    """

    scores: Tensor
    chunks: Tensor
    held: Tensor


def select_chunks(choice: Choice, offered: Tensor, first: int) -> Tensor:
    """One step of a streaming top-k: the best k of k held and C offered chunks; updates ``choice`` in place.

    ``offered`` [K, C] are the scores of chunks ``first``, first + 1, ...; -inf is not on offer. Returns, for
    each slot, which of the C chunks enters it, or -1: int64 [K, k]. Chunks that stay keep their slot; those that enter
    go, in order, to the free slots in order, so that empty slots fill from the lowest up. Of equal scores the
    held one wins, then the earlier chunk. All shapes are fixed: nothing waits for the device.
    """
    scores, chunks, held = choice
    slots, count = scores.shape[1], offered.shape[1]
    both = torch.cat([scores, offered], dim=1)
    order = both.sort(dim=1, descending=True, stable=True).indices[:, :slots]
    best = torch.zeros_like(both, dtype=torch.bool).scatter_(1, order, True) & (both > float("-inf"))
    free, enters = ~best[:, :slots], best[:, slots:]
    nth = torch.where(enters, enters.cumsum(1), 0)  # 1 is the first to enter, 0 catches all that do not
    columns = torch.arange(count, device=scores.device).expand_as(offered)
    entering = offered.new_full((scores.shape[0], slots + 1), -1, dtype=torch.long).scatter_(1, nth, columns)
    source = torch.where(free, entering.gather(1, free.cumsum(1)), -1)
    nobody = held.shape[1] - 1
    moved = source >= 0
    held.scatter_(1, torch.where(moved & (chunks >= 0), chunks, nobody), False)
    held.scatter_(1, torch.where(moved, source + first, nobody), True)
    scores.copy_(torch.where(moved, offered.gather(1, source.clamp(min=0)), scores))
    chunks.copy_(torch.where(moved, source + first, chunks))
    return source


def gather_chunks(source: Tensor, kv: Tensor, slots: Tensor) -> None:
    """Copy the chunks that enter out of a tile: ``kv`` [2, K, C*chunk, D] to ``slots`` [2, K, k, chunk, D].

    ``source`` [K, k] is what ``select_chunks`` returned.
    """
    head, slot = (source >= 0).nonzero(as_tuple=True)
    chunks = kv.unflatten(2, (-1, slots.shape[3]))
    slots[:, head, slot] = chunks[:, head, source[head, slot]]
