"""The cache of sliding layers: as good as the whole text, in the memory of a window."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_triforce.cache.window import WindowCache
from offload_triforce.kernels.ops import AttentionParams
from tests.cache.plain_text import CPU, SCALING, PlainText, Rig, assert_attends, many_operations, operations


class WindowRig(Rig):
    def __init__(self, windows, context):
        self.windows = windows
        text = PlainText(layers=len(windows))
        cache = WindowCache(windows, text.kv_heads, text.dim, context, self.block, text.dtype, CPU)
        super().__init__(cache, text, limit=context)

    def attend(self, layer, query, key, value):
        window = self.windows[layer]
        output = self.cache.attend(layer, query, key, value, AttentionParams(SCALING, window))
        assert_attends(output, query, self.text.kv[layer], window)

    def cut(self, tokens):
        """Some of the newest tokens are forgotten, if the window stays whole; what is pending in any case."""
        newest = min((1, 2, 5, 9, 20)[tokens], self.text.committed)
        whole = self.cache.can_drop(newest, self.text.committed)
        held = self.cache.committed - newest
        assert whole == (held >= min(self.text.committed - newest, max(self.windows)))
        if whole:
            self.cache.drop(newest)
            self.text.kv, self.text.pending = self.text.kv[:, :, :, : self.text.committed - newest], 0
            self.saved = None

    def read_on(self, tokens):
        """A prefill behind what is held, of which each layer brings what its window reaches."""
        self.rollback(0)
        held, more = self.text.committed, min(5 * tokens, self.limit - self.text.committed)
        if not held or not more:
            return
        news, reached = self.text.draw(more), min(held, self.cache.reach)
        for layer in range(self.text.layers):
            kv = torch.cat(
                [torch.full_like(news[layer][:, :, :1], float("nan")).repeat(1, 1, reached, 1), news[layer]], 2
            )
            self.cache.load(layer, kv[:, :, :reached])
            self.cache.fill(layer, kv, self.text.queries(1)[layer], AttentionParams(SCALING, self.windows[layer]))
        self.cache.end_fill(held + more)
        self.text.append(news)
        self.text.pending, self.saved = 0, None

    def check(self):
        held = self.cache.length
        assert torch.equal(self.cache.kv[:, :, :, :held], self.text.kv[:, :, :, len(self.text) - held :])
        assert self.cache.committed >= min(self.text.committed, max(self.windows))


@given(
    operations(most=4, more=("cut", "read_on")),
    st.lists(st.integers(1, 30), min_size=1, max_size=3),
    st.sampled_from([10, 40, 1000]),
)
@settings(deadline=None, max_examples=60)
def test_equals_a_plain_list(steps, windows, context):
    WindowRig(windows, context).run(steps)


@pytest.mark.parametrize("windows", [[5, 16], [64], [1]])
def test_thousands_of_tokens(windows):
    """Nothing is allocated on the way, so the buffer has to be moved to the front many times."""
    rig = WindowRig(windows, context=10**6)
    rig.run(many_operations(3000, most=4))
    assert len(rig.text) > 500 > 4 * rig.cache.capacity
    assert rig.cache.capacity <= max(windows) * 5 // 4 + 3 * rig.block


def test_capacity_is_that_of_a_short_context():
    """A window of 4096 in a text of at most 100 tokens takes the memory of 100."""
    rig = WindowRig([4096], context=100)
    assert rig.cache.capacity < 140
    rig.run([("restart", 90), *[("step", 4), ("commit", 4)] * 4])
    assert len(rig.text) == 100
