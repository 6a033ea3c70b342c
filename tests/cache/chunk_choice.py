"""What a retrieval cache should choose and hold, worked out from the whole text."""

from __future__ import annotations

import torch

from offload_triforce.cache.chunks import PlainChunks
from tests.cache.plain_text import SCALING


def assert_best_choice(cache, layer, query, kv, tail_start, length, sink_known, seen=None):
    """The chunks chosen at ``length`` committed tokens are each head's global top k.

    ``kv`` [2, K, n, D] is the text with the pass's new tokens at its end, from which ``query`` [H, T, D] looks back;
    ``seen`` (bool [T, T]) tells which of those each sees, if they are a tree.
    Always attended, so part of the baseline: the tail from ``tail_start`` on, and the sink once it is there.
    """
    shape, kv_heads, tokens = cache.shape, kv.shape[1], query.shape[1]
    rows = query.double().reshape(kv_heads, -1, tokens, query.shape[2])  # [K, G, T, D]
    keys = kv[0].double()[:, None]
    visible = torch.ones(tokens, kv.shape[2] - tail_start).tril(kv.shape[2] - tail_start - tokens) > 0
    if seen is not None:
        visible[:, kv.shape[2] - tail_start - tokens :] = seen
    near = (rows @ keys[:, :, tail_start:].mT * SCALING).masked_fill(~visible, float("-inf"))
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
    """Which tokens the cache holds at ``length``, after a refresh at ``refreshed``: those of the buffer, (n,), and the
    chosen ones, [K, m].
    """
    shape = cache.shape
    begin = shape.recent_start(refreshed)
    if not begin:
        return torch.arange(length), cache.chosen.new_empty(cache.chosen.shape[1], 0)
    filled = min(len(shape.pool(refreshed)), shape.slots)
    chunks = cache.chosen[layer, :, :filled, None] * shape.chunk + torch.arange(shape.chunk)
    return torch.cat([torch.arange(shape.sink), torch.arange(begin, length)]), chunks.flatten(1)


def gather(kv, places):
    """Of ``kv`` [2, K, n, D] the tokens at ``places`` [K, m], which differ from head to head: [2, K, m, D]."""
    return torch.stack([kv[:, head, places[head]] for head in range(kv.shape[1])], dim=1)


def held_tokens(cache, layer, kv, length, refreshed):
    """All that the retrieval level sees of a text ``kv`` [2, K, n, D] but for its draft tokens: [2, K, m, D]."""
    near, chosen = positions(cache, layer, length, refreshed)
    return torch.cat([kv[:, :, near], gather(kv, chosen)], dim=2)


def assert_holds(cache, layer, kv, length, refreshed):
    """Sink, chosen chunks and recent window, byte for byte; at most the budget, a part of a chunk, and the news."""
    near, chosen = positions(cache, layer, length, refreshed)
    assert torch.equal(cache.settled[layer], kv[:, :, near])
    assert cache.filled * cache.shape.chunk == chosen.shape[1]
    if isinstance(cache.store, PlainChunks):
        assert torch.equal(cache.store.kv[layer, :, :, : cache.filled].flatten(2, 3), gather(kv, chosen))
    assert len(near) + chosen.shape[1] - (length - refreshed) < cache.shape.budget + cache.shape.chunk
    everything = torch.cat([near.expand(len(chosen), -1), chosen], dim=1)
    assert (everything.sort().values.diff() > 0).all(), "no token twice"
