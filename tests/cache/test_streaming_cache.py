"""The draft's cache: sink and newest tokens at positions without a gap, as a list of tokens says."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_triforce.cache.streaming import StreamingCache
from offload_triforce.errors import InputError
from tests.cache.plain_text import CPU, RULE, PlainText, Rig, assert_attends, many_operations, operations
from tests.usual import first


def stamp(kv, start=0):
    """``kv`` [..., 2, K, n, D] with the position of each key in its first channel: what ``turn`` must move."""
    kv = kv.clone()
    kv[..., 0, :, :, 0] = torch.arange(start, start + kv.shape[-2]) / 64
    return kv


def turn(keys, back):
    turned = keys.clone()
    turned[..., 0] -= back / 64
    return turned


def make(capacity, sink, text=None):
    text = text or PlainText()
    return StreamingCache(*text.shape, text.dim, capacity, sink, turn, text.dtype, CPU)


class StreamingRig(Rig):
    """Reads as ModelDrafter does: what is unread, or what ``begin`` asks for."""

    def __init__(self, capacity, sink):
        text = PlainText()
        super().__init__(make(capacity, sink, text), text)
        self.sink, self.at_once, self.held, self.moves = sink, max(1, capacity // 8), [], 0

    def restart(self, tokens):
        """Another text, which nobody has read yet."""
        self.saved = None
        self.cache.reset()
        self.text.clear()
        self.text.append(self.text.draw(tokens))
        self.text.commit(tokens)

    def save(self, tokens):
        super().save(tokens)
        self.saved_held = self.held[: self.cache.committed]

    def back(self, tokens):
        if self.saved is not None:
            self.held = self.saved_held[:]
        super().back(tokens)

    def step(self, tokens):
        cache, text = self.cache, self.text
        tokens = min(tokens, self.block - text.pending)
        if not tokens:
            return
        text.append(text.draw(tokens))
        reading = self.begin_text() if not cache.length else self.make_room(tokens)
        queries, start = text.queries(len(reading)), len(self.held)
        self.held += reading
        for layer in range(text.layers):
            key, value = stamp(text.kv[layer][:, :, reading], start)
            output = cache.attend(layer, queries[layer], key, value, RULE)
            assert_attends(output, queries[layer], stamp(text.kv[layer][:, :, self.held]))
        cache.end_step(len(reading))
        cache.settle(cache.pending - text.pending)

    def begin_text(self):
        """The sink and the newest tokens of a long text, or all of a short one; a part of the cache stays free."""
        reading = [position for part in self.cache.begin(len(self.text)) for position in part]
        everything, most = list(range(len(self.text))), self.cache.capacity - self.at_once
        if len(everything) > most:
            everything = everything[: self.sink] + everything[self.sink - most :]
        assert reading == everything
        self.held = []
        return reading

    def make_room(self, tokens):
        """When it is full, the oldest settled tokens behind the sink go: an eighth at once, or as many as can."""
        settled = len(self.held) - (self.text.pending - tokens)
        missing = len(self.held) + tokens - self.cache.capacity
        if missing > 0:
            gone = max(missing, min(self.at_once, settled - self.sink))
            del self.held[self.sink : self.sink + gone]
            self.moves += 1
        self.cache.make_room(tokens)
        return list(range(len(self.text) - tokens, len(self.text)))

    def check(self):
        cache, text = self.cache, self.text
        if not cache.length:
            return
        self.held = [position for position in self.held if position < len(text)]
        assert cache.text == len(text)
        assert cache.length == len(self.held) <= cache.capacity
        assert torch.equal(cache.kv[:, :, :, : cache.length], stamp(text.kv[:, :, :, self.held]))
        newest = len(self.held) - self.sink
        assert self.held[: self.sink] == list(range(min(self.sink, len(text))))
        assert newest <= 0 or self.held[-newest:] == list(range(len(text) - newest, len(text)))


@given(operations(most=4), st.integers(0, 6), st.integers(0, 20))
@settings(deadline=None, max_examples=60)
def test_equals_the_policy_on_a_list(steps, sink, extra):
    StreamingRig(2 * (sink + StreamingRig.block + 2) + extra, sink).run(steps * 2)


@pytest.mark.parametrize(("capacity", "sink"), [(16, 0), (20, 4), (64, 4)])
@pytest.mark.parametrize("steps", first(1, [1000, 3000]))
def test_thousands_of_steps(capacity, sink, steps):
    rig = StreamingRig(capacity, sink)
    rig.run([("restart", 200), *many_operations(steps, most=4)])
    assert len(rig.text) > 200 + steps / 6
    assert rig.moves > steps / 60


def test_a_long_prompt_is_not_read_in_the_middle():
    cache = make(40, 4)
    assert cache.begin(1000) == [range(4), range(969, 1000)]
    assert cache.skipped == 965
    assert cache.begin(35) == [range(35)]
    assert cache.skipped == 0


def test_pending_tokens_do_not_make_room():
    """Only what is settled may go: a pending token may have to be followed by another one."""
    cache, kv = make(32, 2), PlainText().draw(32)
    for layer in range(2):
        cache.write(layer, *kv[layer])
    cache.end_step(32)
    cache.settle(4)  # two of them behind the sink
    with pytest.raises(IndexError, match="3 tokens do not fit beside 28 pending ones"):
        cache.make_room(3)
    assert torch.equal(cache.kv, kv)
    cache.make_room(1)
    assert (cache.length, cache.pending, cache.text) == (30, 28, 32)
    assert torch.equal(cache.kv[:, 1, :, :30], kv[:, 1, :, [0, 1, *range(4, 32)]])


@pytest.mark.parametrize("sink", [0, 1, 4, 9, 100])
def test_too_small_a_capacity_is_refused_with_one_that_fits(sink):
    with pytest.raises(InputError, match=f"no room for a recent window beside {sink} sink tokens") as caught:
        make(sink + 1, sink)
    enough = int(re.search(r"at least (\d+)", str(caught.value)).group(1))
    make(enough, sink)
