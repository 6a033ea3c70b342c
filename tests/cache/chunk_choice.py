"""What a retrieval cache should choose and hold, worked out from the whole text."""

from __future__ import annotations

import torch

from tests.cache.plain_text import SCALING


def assert_best_choice(cache, layer, query, kv, tail_start, length, sink_known):
    """The chunks chosen at ``length`` committed tokens are each head's global top k.

    ``kv`` [2, K, n, D] is the text with the pass's new tokens at its end, from which ``query`` [H, T, D] looks back.
    Always attended, so part of the baseline: the tail from ``tail_start`` on, and the sink once it is there.
    """
    shape, kv_heads, tokens = cache.shape, kv.shape[1], query.shape[1]
    rows = query.double().reshape(kv_heads, -1, tokens, query.shape[2])  # [K, G, T, D]
    keys = kv[0].double()[:, None]
    near = (rows @ keys[:, :, tail_start:].mT * SCALING).masked_fill(
        torch.ones(tokens, kv.shape[2] - tail_start).tril(kv.shape[2] - tail_start - tokens) == 0,
        float("-inf"),
    )
    sink = rows @ keys[:, :, : shape.sink if sink_known else 0].mT * SCALING
    baseline = torch.cat([sink, near], dim=3).logsumexp(3)  # [K, G, T]
    chunks = length // shape.chunk
    means = keys[:, :, : chunks * shape.chunk].unflatten(2, (chunks, shape.chunk)).mean(3)
    scores = (rows @ means.mT * SCALING - baseline[..., None]).flatten(1, 2).logsumexp(1)  # [K, C]
    pool = shape.pool(length)
    count = min(len(pool), shape.slots)
    chosen = cache.chosen[layer, :, :count]
    assert (cache.chosen[layer, :, count:] == -1).all(), "slots fill from the lowest"
    assert (chosen.sort().values.diff() > 0).all(), "no chunk twice"
    assert ((chosen >= pool.start) & (chosen < pool.stop)).all(), "neither sink nor recent window"
    best = scores[:, pool.start : pool.stop].topk(count).values
    taken = scores.gather(1, chosen).sort(descending=True).values
    torch.testing.assert_close(taken, best, rtol=1e-4, atol=1e-4)


def positions(cache, layer, length, refreshed):
    """Which tokens the cache holds at ``length``, in its order, after a refresh at ``refreshed``: [K, n]."""
    shape, kv_heads = cache.shape, cache.chosen.shape[1]
    begin = shape.recent_start(refreshed)
    if not begin:
        return torch.arange(length).expand(kv_heads, -1)
    filled = min(len(shape.pool(refreshed)), shape.slots)
    chunks = cache.chosen[layer, :, :filled, None] * shape.chunk + torch.arange(shape.chunk)
    around = torch.arange(shape.sink), torch.arange(begin, length)
    sink, recent = (part.expand(kv_heads, -1) for part in around)
    return torch.cat([sink, chunks.flatten(1), recent], dim=1)


def gather(kv, places):
    """Of ``kv`` [2, K, n, D] the tokens at ``places`` [K, m], which differ from head to head: [2, K, m, D]."""
    return torch.stack([kv[:, head, places[head]] for head in range(kv.shape[1])], dim=1)


def assert_holds(cache, layer, kv, length, refreshed):
    """Sink, chosen chunks and recent window, byte for byte; at most the budget, a part of a chunk, and the news."""
    places = positions(cache, layer, length, refreshed)
    assert cache.committed == places.shape[1]
    assert torch.equal(cache.settled[layer], gather(kv[:, :, :length], places))
    assert cache.committed - (length - refreshed) < cache.shape.budget + cache.shape.chunk
    assert (places.sort().values.diff() > 0).all(), "no token twice"
