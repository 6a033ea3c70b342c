"""What the caches are measured against: a text with all its keys and values, and dense attention."""

from __future__ import annotations

import random

import torch
from hypothesis import strategies as st

from offload_triforce.kernels.ops import AttentionParams

CPU = torch.device("cpu")
SCALING = 0.5
RULE = AttentionParams(SCALING)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def dense_attention(query, kv, window=None):
    """Attention of the last T of n tokens in float64: query [H, T, D], ``kv`` [2, K, n, D] -> [H, T, D]."""
    tokens, total = query.shape[1], kv.shape[2]
    key, value = kv.double().repeat_interleave(query.shape[0] // kv.shape[1], dim=1)
    ahead = torch.arange(total)[None, :] - torch.arange(total - tokens, total)[:, None]
    hidden = ahead > 0 if window is None else (ahead > 0) | (ahead <= -window)
    scores = (query.double() @ key.mT * SCALING).masked_fill(hidden, float("-inf"))
    return scores.softmax(dim=-1) @ value


def assert_attends(output, query, kv, window=None):
    expected = dense_attention(query, kv, window).to(output.dtype)
    torch.testing.assert_close(output, expected, rtol=TOLERANCE[output.dtype], atol=TOLERANCE[output.dtype])


class PlainText:
    """All keys and values of a text, ``kv`` [layers, 2, K, n, D]. Its last ``pending`` tokens are not judged."""

    def __init__(self, layers=2, kv_heads=2, groups=3, dim=4, dtype=torch.float32, seed=0):
        self.random = torch.Generator().manual_seed(seed)
        self.layers, self.kv_heads, self.heads = layers, kv_heads, kv_heads * groups
        self.dim, self.dtype = dim, dtype
        self.clear()

    @property
    def shape(self):
        """The leading arguments of every cache."""
        return self.layers, self.kv_heads

    def __len__(self):
        return self.kv.shape[3]

    @property
    def committed(self):
        return len(self) - self.pending

    def clear(self):
        self.kv, self.pending = self.draw(0), 0

    def draw(self, tokens):
        """Keys and values that nobody has seen before, [layers, 2, K, tokens, D]."""
        shape = (self.layers, 2, self.kv_heads, tokens, self.dim)
        return torch.randn(shape, generator=self.random).to(self.dtype)

    def queries(self, tokens):
        """[layers, H, tokens, D], large enough for a few keys to stand out."""
        shape = (self.layers, self.heads, tokens, self.dim)
        return 2 * torch.randn(shape, generator=self.random).to(self.dtype)

    def append(self, kv):
        self.kv = torch.cat([self.kv, kv], dim=3)
        self.pending += kv.shape[3]

    def keep_pending(self, tokens):
        self.kv = self.kv[:, :, :, : self.committed + tokens]
        self.pending = tokens

    def commit(self, tokens):
        self.keep_pending(tokens)
        self.pending = 0


# What a cache goes through, as (name, tokens). The rig cuts the number down to what is possible.
def operations(most, restart=60, more=()):
    """Lists of operations that grow by at most ``most`` tokens each. For hypothesis. ``more``: others of the rig's."""
    few = st.integers(0, most)
    names = ("step", "step", "commit", "commit", "keep", "rollback", "save", "back", *more)
    kinds = [st.tuples(st.just(name), few) for name in names]
    return st.lists(st.one_of(*kinds, st.tuples(st.just("restart"), st.integers(0, restart))), min_size=15, max_size=60)


def many_operations(count, most, seed=0):
    """The same at random, without restarts: for thousands of steps."""
    chance = random.Random(seed)
    names = ["step"] * 4 + ["commit"] * 3 + ["keep", "rollback"]
    return [(chance.choice(names), chance.randint(0, most)) for _ in range(count)]


class Rig:
    """A cache beside a plain text. Every operation is done to both, and they are compared after each."""

    block = 4  # most tokens pending at once

    def __init__(self, cache, text, limit=10**9):
        self.cache, self.text, self.limit = cache, text, limit
        self.saved = None

    def run(self, operations):
        for name, tokens in operations:
            getattr(self, name)(tokens)
            assert self.cache.pending == self.text.pending
            self.check()

    def step(self, tokens):
        """A forward step: its tokens attend to everything before them, and become pending."""
        tokens = min(tokens, self.block - self.text.pending, self.limit - len(self.text))
        if tokens:
            kv, queries = self.text.draw(tokens), self.text.queries(tokens)
            self.text.append(kv)
            self.begin()
            for layer in range(self.text.layers):
                self.attend(layer, queries[layer], *kv[layer])
            self.cache.end_step(tokens)

    def keep(self, tokens):
        tokens = min(tokens, self.text.pending)
        self.cache.select(range(tokens))
        self.text.keep_pending(tokens)

    def commit(self, tokens):
        tokens = min(tokens, self.text.pending)
        self.cache.commit(tokens)
        self.text.commit(tokens)

    def rollback(self, _):
        self.cache.commit(0)
        self.text.commit(0)

    def save(self, _):
        """A snapshot of what is committed; another one replaces it."""
        self.saved = self.cache.snapshot(), self.text.kv[:, :, :, : self.text.committed]

    def back(self, _):
        """The text goes on from the snapshot, however it went on before."""
        if self.saved is not None:
            snapshot, self.text.kv = self.saved
            self.text.pending = 0
            self.cache.restore(snapshot)

    def restart(self, tokens):
        """Another text, with a prompt of that many tokens."""
        self.saved = None
        tokens = min(tokens, self.limit)
        self.cache.reset()
        assert self.cache.length == self.cache.pending == 0
        self.text.clear()
        self.fill(self.text.draw(tokens))

    def fill(self, kv):
        for layer in range(self.text.layers):
            self.cache.fill(layer, kv[layer], self.text.queries(1)[layer], RULE)
        self.cache.end_fill(kv.shape[3])
        self.text.append(kv)
        self.text.pending = 0

    def begin(self):
        """Before a forward step."""

    def attend(self, layer, query, key, value):
        """One layer of a forward step, compared with dense attention."""
        raise NotImplementedError

    def check(self):
        """Compare what is held."""
        raise NotImplementedError
