"""Ways to choose what lies in the retrieval cache, and what each of them makes of the queries that a pass leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from offload_triforce.cache.sizes import RetrievalShape, equal_slots
from offload_triforce.config import Settings
from offload_triforce.errors import InputError
from offload_triforce.kernels import ops

# Tokens that a step reads; as many of the newest queries make the choice.
BLOCK = 16
# Budgets, in multiples of the smallest.
MULTIPLES = (1, 2, 4)
# With it the longest chunks that are compared have room for one, whatever the head dimension (8 at least).
LEAST_BUDGET = 136


@dataclass(frozen=True)
class Way:
    """One way to choose.

    Attributes:
        name: short. about: what it differs from the default in. shape: how memory is spent, per KV head and layer.
        key: what stands for a chunk: the mean of its keys, the bound that their least and greatest channels give
            ("bounds", as in Quest, arXiv 2406.10774), or all of them ("every": the mean of exp(q . k)).
        fold: how the wishes of several queries become one: the "sum" of exp(wish - baseline), as ``ops.chunk_scores``
            has it; the "max" of wish - baseline; the "mean" of the wishes; or the sum of each query's "share", which is
            its softmax over all chunks.
        queries: how many of the newest ones are asked.
        when: "each pass", by the pass before; "once", by the prompt; "hindsight", by the very queries that then
            attend; "newest" takes what is newest.
        layers: slots "alike" in all layers, in proportion to what the layers "need", or where they "gain" most.
    """

    name: str
    about: str
    shape: RetrievalShape
    key: Literal["mean", "bounds", "every"] = "mean"
    fold: Literal["sum", "max", "mean", "share"] = "sum"
    queries: int = BLOCK
    when: Literal["each pass", "once", "hindsight", "newest"] = "each pass"
    layers: Literal["alike", "need", "gain"] = "alike"


class Asking(NamedTuple):
    """What the choice is made from: ``queries`` [H, T, D] of each layer, which are those of the newest of ``end``
    tokens; of these, ``refreshed`` tokens had been committed before.
    """

    queries: Sequence[Tensor]
    end: int
    refreshed: int


def same_memory(reference: RetrievalShape, chunk: int, bits: int, head_dim: int) -> RetrievalShape:
    """The shape with other chunks that takes no more memory than ``reference``, with a model in 16 bits.

    Raises:
        InputError: there is no room for a single chunk.
    """
    sink = math.lcm(reference.sink, chunk) if reference.sink else 0
    slots = equal_slots(reference, chunk, sink, reference.recent, bits, head_dim)
    if slots < 1:
        raise InputError(
            f"a budget of {reference.budget} tokens leaves no room for a single chunk of {chunk} tokens in {bits} "
            f"bits; take at least {LEAST_BUDGET}"
        )
    return RetrievalShape(sink + reference.recent + slots * chunk, chunk, sink, reference.recent, bits)


def make_ways(settings: Settings, budget: int, head_dim: int) -> list[Way]:
    """All ways that are compared; the first is the default.

    Args:
        settings: what the default is. budget: tokens that the memory would hold in 16 bits. head_dim: of the model.

    Raises:
        InputError: a budget without room.
    """
    chunk, bits = settings.chunk, settings.bits

    def plain(times: int) -> RetrievalShape:
        return RetrievalShape(times * budget, chunk, settings.sink, settings.recent)

    unit = plain(1)
    shape = same_memory(unit, chunk, bits, head_dim)
    usual = Way("default", "default", shape)
    ways = [usual]
    for key, name in (("bounds", "least and greatest keys"), ("every", "every key")):
        ways.append(replace(usual, name=name, about="key", key=key))
    for fold, name in (("max", "the keenest query"), ("mean", "mean query"), ("share", "shares of queries")):
        ways.append(replace(usual, name=name, about="fold", fold=fold))
    ways.append(replace(usual, name="shares, every key", about="fold", key="every", fold="share"))
    ways += [replace(usual, name=f"newest queries: {n}", about="queries", queries=n) for n in (1, 4)]
    for size in (4, 16, 32):
        if size != chunk:
            other = same_memory(unit, size, bits, head_dim)
            ways.append(replace(usual, name=f"chunks of {size}", about="chunk", shape=other))
    for width in (8, 16):
        other = replace(shape, bits=width)
        ways.append(replace(usual, name=f"{width} bits, equal tokens", about="bits", shape=other))
    ways.append(replace(usual, name="once", about="when", when="once"))
    ways.append(replace(usual, name="once, 16 bits", about="when", when="once", shape=unit))
    ways.append(replace(usual, name="newest chunks", about="when", when="newest"))
    ways.append(replace(usual, name="hindsight", about="when", when="hindsight", key="every", fold="share"))
    ways.append(replace(usual, name="layers by need", about="layers", layers="need"))
    ways.append(replace(usual, name="layers by gain", about="layers", layers="gain"))
    for times in MULTIPLES:
        for width in (4, 8, 16):
            if (times, width) != (1, bits):
                other = same_memory(plain(times), chunk, width, head_dim)
                ways.append(replace(usual, name=f"memory x{times}, {width} bits", about="memory", shape=other))
    return ways + _together(usual, plain(MULTIPLES[-1]), head_dim)


def _together(usual: Way, much: RetrievalShape, head_dim: int) -> list[Way]:
    """What helps most, at once, and in as much memory as ``much`` takes."""
    chunk, bits, more = usual.shape.chunk, usual.shape.bits, f"memory x{MULTIPLES[-1]}"
    usual = replace(usual, about="together")
    fine = same_memory(usual.shape, 4, bits, head_dim)
    large, large_fine = (same_memory(much, size, bits, head_dim) for size in (chunk, 4))
    return [
        replace(usual, name="chunks of 4, every key", shape=fine, key="every"),
        replace(usual, name=f"{more}, chunks of 4", shape=large_fine),
        replace(usual, name=f"{more}, every key", shape=large, key="every"),
        replace(usual, name=f"{more}, chunks of 4, every key", shape=large_fine, key="every"),
        replace(usual, name=f"{more}, once", shape=large, when="once"),
        replace(usual, name=f"{more}, once, 16 bits", shape=much, when="once"),
    ]


def chunk_wishes(packed: Tensor, keys: Tensor, chunk: int, key: str, scaling: float) -> Tensor:
    """How much each query [K, R, D] wants each chunk of ``keys`` [K, C*chunk, D], as a score: float32 [K, R, C]."""
    packed, parts = packed.float(), keys.float().unflatten(1, (-1, chunk))
    if key == "mean":
        return packed @ parts.mean(2).mT * scaling
    if key == "bounds":
        above = packed.clamp(min=0) @ parts.amax(2).mT
        return (above + packed.clamp(max=0) @ parts.amin(2).mT) * scaling
    scores = packed @ keys.float().mT * scaling
    return scores.unflatten(2, (-1, chunk)).logsumexp(3) - math.log(chunk)


def near_baseline(packed: Tensor, keys: Tensor, tokens: int, sink: int, near: int, scaling: float) -> Tensor:
    """Each query's log-sum-exp over what is always attended: float32 [K, G*T].

    Args:
        packed: queries of the newest ``tokens`` of ``keys`` [K, n, D]. sink: tokens at the start; left out where they
            lie in the rest. near: where that begins.
    """
    packed, keys = packed.float(), keys.float()
    scores = packed @ keys[:, near:].mT * scaling
    mask = ops.causal_mask(tokens, scores.shape[2], device=packed.device)
    scores = scores.masked_fill(~mask.repeat(packed.shape[1] // tokens, 1), float("-inf"))
    baseline = scores.logsumexp(2)
    if 0 < sink <= near:
        baseline = torch.logaddexp(baseline, (packed @ keys[:, :sink].mT * scaling).logsumexp(2))
    return baseline


def chunk_scores(
    way: Way, queries: Tensor, keys: Tensor, scaling: float, refreshed: int, near: int | None = None
) -> Tensor:
    """How much a layer's queries want each chunk that may be chosen: float32 [K, C].

    Args:
        way: how it is worked out.
        queries: [H, T, D], of the newest of ``keys`` [K, n, D]; only ``way.queries`` of them are asked.
        refreshed: tokens committed before the pass that asks.
        near: where the tokens begin whose attention is the baseline; None is the recent window. (The tail of a full
            cache may begin earlier.)
    """
    shape, heads, asking = way.shape, keys.shape[0], queries.shape[1]
    pool, chunk = shape.pool(refreshed), shape.chunk
    if near is None:
        near = max(0, min(keys.shape[1] - asking, refreshed - shape.recent))
    asked = queries[:, -way.queries :]
    packed = ops.pack_queries(asked, heads)
    part = keys[:, pool.start * chunk : pool.stop * chunk]
    if not len(pool):
        return keys.new_zeros(heads, 0, dtype=torch.float32)
    if way.when == "newest":
        return torch.arange(len(pool), dtype=torch.float32, device=keys.device).expand(heads, -1)
    baseline = near_baseline(packed, keys, asked.shape[1], shape.sink, near, scaling)
    if way.key == "mean" and way.fold == "sum":
        return ops.chunk_scores(packed, part, chunk, scaling, baseline)
    wishes = chunk_wishes(packed, part, chunk, way.key, scaling)
    if way.fold == "mean":
        return wishes.mean(1)
    if way.fold == "share":
        baseline = torch.logaddexp(baseline, (wishes + math.log(chunk)).logsumexp(2))
    wishes = wishes - baseline[..., None]
    return wishes.amax(1) if way.fold == "max" else wishes.logsumexp(1)


def best(scores: Tensor, slots: int) -> Tensor:
    """The columns of the best, [K, min(slots, C)], in descending order; of equal scores the earlier one wins."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :slots]
