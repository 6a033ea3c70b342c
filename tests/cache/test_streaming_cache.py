"""The draft's cache: sink and newest tokens, as a list of positions says."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_text import CPU, SCALING, PlainText, Rig, assert_attends, many_operations, operations

from offload_triforce.cache.streaming import StreamingCache
from offload_triforce.errors import InputError


def make(text, capacity, sink):
    return StreamingCache(*text.shape, text.dim, capacity, sink, text.dtype, CPU)


class StreamingRig(Rig):
    """Reads as ModelDraft does: what is unread, or what a refill asks for."""

    def __init__(self, capacity, sink):
        text = PlainText()
        super().__init__(make(text, capacity, sink), text)
        self.sink, self.held, self.refills = sink, [], 0

    def step(self, tokens):
        cache, text = self.cache, self.text
        tokens = min(tokens, self.block - text.pending)
        if not tokens:
            return
        settled = text.committed
        text.append(text.draw(tokens))
        reading = list(range(len(text) - tokens, len(text)))
        if cache.length + tokens > cache.capacity:
            reading = [position for part in cache.refill(len(text)) for position in part]
            self.held, self.refills = [], self.refills + 1
            assert reading == self.policy()
        self.held += reading
        queries = text.queries(len(reading))
        for layer in range(text.layers):
            key, value = text.kv[layer][:, :, reading]
            output = cache.attend(layer, queries[layer], key, value, SCALING)
            assert_attends(output, queries[layer], text.kv[layer][:, :, self.held])
        cache.end_step(len(reading))
        cache.settle(cache.pending - (len(text) - settled))

    def policy(self):
        """Three quarters of the capacity: the sink and the newest tokens, or a short text as a whole."""
        keep = self.cache.capacity - max(1, self.cache.capacity // 4)
        everything = list(range(len(self.text)))
        return (
            everything
            if len(everything) <= keep
            else everything[: self.sink] + everything[self.sink - keep :]
        )

    def restart(self, _):
        self.cache.reset()
        self.text.clear()

    def check(self):
        self.held = [position for position in self.held if position < len(self.text)]
        assert self.cache.text == len(self.text)
        assert self.cache.length == len(self.held) <= self.cache.capacity
        assert torch.equal(self.cache.kv[:, :, :, : self.cache.length], self.text.kv[:, :, :, self.held])
        newest = len(self.held) - self.sink
        assert self.held[: self.sink] == list(range(min(self.sink, len(self.text))))
        assert newest <= 0 or self.held[-newest:] == list(range(len(self.text) - newest, len(self.text)))


@given(operations(most=4), st.integers(0, 6), st.integers(0, 20))
@settings(deadline=None, max_examples=80)
def test_equals_the_policy_on_a_list(steps, sink, extra):
    capacity = 2 * (sink + StreamingRig.block + 2) + extra
    StreamingRig(capacity, sink).run(steps * 2)


@pytest.mark.parametrize(("capacity", "sink"), [(16, 0), (20, 4), (64, 4)])
def test_thousands_of_steps(capacity, sink):
    rig = StreamingRig(capacity, sink)
    rig.run(many_operations(3000, most=4))
    assert len(rig.text) > 500
    assert rig.refills > 500 // capacity


def test_a_long_prompt_is_never_read_in_the_middle():
    cache = make(PlainText(), 40, 4)
    assert cache.refill(1000) == [range(4), range(974, 1000)]
    assert cache.skipped == 970
    assert cache.refill(30) == [range(30)]
    assert cache.skipped == 0


@pytest.mark.parametrize("sink", [0, 1, 4, 9, 100])
def test_too_small_a_capacity_is_refused_with_one_that_fits(sink):
    with pytest.raises(InputError, match=f"no room for a recent window beside {sink} sink tokens") as caught:
        make(PlainText(), sink + 1, sink)
    enough = int(re.search(r"at least (\d+)", str(caught.value)).group(1))
    make(PlainText(), enough, sink)
