"""Eager twins: every operation of the hot path in plain torch, on any device.

Shapes use T new tokens (queries), n cached tokens, H query heads, K KV heads, G = H / K query heads per KV
head, D the head dimension, C chunks. Queries are *packed*: the G query heads of one KV head become rows of
one matrix, [K, G*T, D] with row g*T + t, so that KV heads are never repeated. Arithmetic is float32
whatever the dtype of the inputs, as flash attention accumulates.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from offload_triforce.kernels.reference_codec import encode_chunks
from offload_triforce.kernels.types import AttentionParams, ChunkSelection, CodedChunks, PartialAttention, TreeMask

INT8_ROWS = 8192  # of an 8-bit matrix, that are unpacked at a time


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
    params: AttentionParams,
    tree_mask: TreeMask | None = None,
) -> PartialAttention:
    """Take the keys and values of one tile in: ``key`` and ``value`` are [K, n, D].

    Without ``tree_mask`` every query sees every key, whatever the window.
    """
    scores = torch.matmul(packed.float(), key.float().transpose(1, 2)) * params.scaling
    if params.softcap is not None:
        scores = params.softcap * torch.tanh(scores / params.softcap)
    if tree_mask is not None:
        mask = visible_keys(key.shape[1], tree_mask, params.window)
        scores = scores.masked_fill(~mask.repeat(packed.shape[1] // mask.shape[0], 1), float("-inf"))
    maximum = torch.maximum(state.maximum, scores.amax(dim=-1))
    weights = torch.exp(scores - maximum[..., None])
    decay = torch.exp(state.maximum - maximum)
    return PartialAttention(
        maximum,
        state.total * decay + weights.sum(dim=-1),
        state.weighted * decay[..., None] + torch.matmul(weights, value.float()),
    )


def visible_keys(keys: int, tree_mask: TreeMask, window: int | None) -> Tensor:
    """Which of the keys each query sees: bool [T, keys]."""
    mask, device = tree_mask.mask, tree_mask.mask.device
    tokens, masked = mask.shape
    end = keys if tree_mask.length is None else tree_mask.length
    column = torch.arange(keys, device=device)
    place = column - end + masked  # in the mask
    visible = (place < masked) & (mask[:, place.clamp(0, masked - 1)] | (place < 0))
    if window is not None:
        rows = tree_mask.positions
        if rows is None:
            rows = torch.arange(tokens, device=device) + (end - tokens)
        visible &= column > rows[:, None] - window
    return visible


def attention_logsumexp(state: PartialAttention) -> Tensor:
    """Log-sum-exp of the scores so far, per query: [K, G*T]."""
    return state.maximum + state.total.log()


def attention_finish(state: PartialAttention, heads: int, dtype: torch.dtype, sinks: Tensor | None = None) -> Tensor:
    """Normalise and unpack: [H, T, D] in ``dtype``. ``sinks`` [H] (see ``AttentionParams``) join the softmax here."""
    maximum, total, weighted = state
    if sinks is not None:
        sink = sinks.float().reshape(maximum.shape[0], -1).repeat_interleave(maximum.numel() // heads, dim=1)
        highest = torch.maximum(maximum, sink)  # neither exponential below can overflow
        decay = torch.exp(maximum - highest)
        total, weighted = total * decay + torch.exp(sink - highest), weighted * decay[..., None]
    output = weighted / total[..., None]
    return output.reshape(heads, -1, output.shape[-1]).to(dtype)


def prefill_attention(query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
    """Attention of the last T of n tokens over all n: query [H, T, D], key and value [K, n, D] -> [H, T, D].

    torch's own fused kernels: the causal mask is aligned to the lower right corner, and keys that a
    sliding window hides from every query are not read. They know neither soft-capping nor learned sinks: those go part
    by part.
    """
    tokens = query.shape[1]
    if params.window is not None:
        reach = min(key.shape[1], tokens + params.window - 1)
        key, value = key[:, -reach:], value[:, -reach:]
    if params.softcap is not None or params.sinks is not None:
        return _attention_by_parts(query, key, value, params)
    if params.window is not None:
        mask = causal_mask(tokens, key.shape[1], params.window, query.device)
    else:
        mask = causal_lower_right(tokens, key.shape[1])
    gqa = query.shape[0] != key.shape[0]
    if gqa and query.is_cuda and (query.dtype == torch.float32 or params.window is not None):
        # No fused CUDA kernel takes grouped heads in float32, or with a mask: the fallback holds all scores at once.
        group = query.shape[0] // key.shape[0]
        key, value, gqa = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0), False
    return F.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=mask, scale=params.scaling, enable_gqa=gqa
    )[0]


def _attention_by_parts(query: Tensor, key: Tensor, value: Tensor, params: AttentionParams, part: int = 1024) -> Tensor:
    """The same with soft-capped scores or learned sinks, ``part`` keys at a time."""
    tokens, total = query.shape[1], key.shape[1]
    packed = pack_queries(query, key.shape[0])
    state = attention_start(packed)
    own = torch.arange(total - tokens, total, device=query.device)[:, None]
    for start in range(0, total, part):
        stop = min(start + part, total)
        column = torch.arange(start, stop, device=query.device)
        mask = column <= own if params.window is None else (column <= own) & (column > own - params.window)
        state = attention_update(
            state, packed, key[:, start:stop], value[:, start:stop], params._replace(window=None), TreeMask(mask)
        )
    return attention_finish(state, query.shape[0], query.dtype, params.sinks)


def chunk_scores(
    packed: Tensor, key: Tensor, chunk: int, scaling: float, baseline: Tensor, held: Tensor | None = None
) -> Tensor:
    """How much the queries of the block want each chunk of ``key`` [K, C*chunk, D]: float32 [K, C].

    A query's wish for a chunk is exp(q . mean key - baseline), with ``baseline`` [K, G*T] that query's
    log-sum-exp over keys that are always attended. The wishes of all rows, hence of the whole GQA group, add up.
    The baseline is fixed before the first tile streams by, which makes scores of different tiles comparable
    without a second look at any of them. Chunks that are ``held`` (bool [K, C]) are not on offer: -inf.
    Mean keys are rounded to the dtype of the keys, for tensor cores: scores only choose what drafts are made from.
    """
    heads, tokens, dim = key.shape
    means = key.float().reshape(heads, tokens // chunk, chunk, dim).mean(dim=2).to(key.dtype).float()
    wishes = torch.matmul(packed.float(), means.transpose(1, 2)) * scaling - baseline[..., None]
    scores = torch.logsumexp(wishes, dim=1)
    return scores if held is None else scores.masked_fill(held, float("-inf"))


def select_chunks(selection: ChunkSelection, offered: Tensor, first: int) -> Tensor:
    """One step of a streaming top-k: the best k of k held and C offered chunks; updates ``selection`` in place.

    ``offered`` [K, C] are the scores of chunks ``first``, first + 1, ...; -inf is not on offer. Returns, for
    each slot, which of the C chunks enters it, or -1: int64 [K, k]. Chunks that stay keep their slot; those that enter
    go, in order, to the free slots in order, so that empty slots fill from the lowest up. Of equal scores the
    held one wins, then the earlier chunk. All shapes are fixed: nothing waits for the device.
    """
    scores, chunks, held = selection
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


def take_chunks(
    selection: ChunkSelection, offered: Tensor, first: int, kv: Tensor, slots: Tensor | CodedChunks
) -> None:
    """``select_chunks``, and what enters is copied out of the tile ``kv`` [2, K, C*chunk, D] into its slot.

    ``slots``: [2, K, k, chunk, D] for chunks as they are, or room for packed ones.
    """
    put_chunks(select_chunks(selection, offered, first), kv, slots)


def put_chunks(source: Tensor, kv: Tensor, slots: Tensor | CodedChunks) -> None:
    """``gather_chunks`` or ``encode_chunks``, as the slots want it: ``source`` [K, k] says which chunk, or -1."""
    if isinstance(slots, CodedChunks):
        encode_chunks(source, kv, slots)
    else:
        gather_chunks(source, kv, slots)


def int8_product(hidden: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """``hidden`` [T, D] times the matrix ``codes`` [R, D] (int8) with one float32 factor per row, ``scale`` [R].

    Added up in float32 and then multiplied with the scale. Returns [T, R] in the dtype of ``hidden``.
    """
    output = torch.empty(hidden.shape[0], codes.shape[0], dtype=hidden.dtype, device=hidden.device)
    wide = hidden.float()
    for start in range(0, codes.shape[0], INT8_ROWS):  # so that no more of the matrix than this is ever unpacked
        end = start + INT8_ROWS
        output[:, start:end] = (wide @ codes[start:end].float().T) * scale[start:end]
    return output
