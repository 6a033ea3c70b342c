"""The piece that every cache is made of: grows, takes back, and refuses what it cannot do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from offload_triforce.cache.buffer import GrowingBuffer
from tests.cache.plain_text import CPU, RULE, PlainText, Rig, assert_attends, many_operations, operations


def make(capacity, layers=2, heads=2, dim=4):
    return GrowingBuffer(layers, heads, capacity, dim, torch.float32, CPU)


class BufferRig(Rig):
    def attend(self, layer, query, key, value):
        output = self.cache.attend(layer, query, key, value, RULE)
        assert_attends(output, query, self.text.kv[layer])

    def fill(self, kv):
        for layer in range(self.text.layers):
            self.cache.write(layer, *kv[layer])
        self.cache.end_step(kv.shape[3])
        self.cache.settle(kv.shape[3])
        self.text.append(kv)
        self.text.pending = 0

    def check(self):
        assert self.cache.length == len(self.text)
        assert self.cache.committed == self.text.committed
        assert torch.equal(self.cache.kv[:, :, :, : self.cache.length], self.text.kv)
        assert torch.equal(self.cache.settled, self.text.kv[:, :, :, : self.text.committed])


@given(operations(most=4))
@settings(deadline=None, max_examples=40)
def test_equals_a_plain_list(steps):
    BufferRig(make(70), PlainText(), limit=70).run(steps)


def test_thousands_of_steps():
    rig = BufferRig(make(4000), PlainText(), limit=4000)
    rig.run(many_operations(3000, most=4))
    assert len(rig.text) > 500


def filled(committed, pending, capacity=10):
    buffer, kv = make(capacity), PlainText().draw(committed + pending)
    for layer in range(2):
        buffer.write(layer, *kv[layer])
    buffer.end_step(committed + pending)
    buffer.settle(committed)
    return buffer, kv


@pytest.mark.parametrize("front", [0, 1, 4, 5])
def test_drop_front_moves_the_rest_pending_tokens_too(front):
    buffer, kv = filled(committed=5, pending=3)
    buffer.drop_front(front)
    assert (buffer.committed, buffer.pending) == (5 - front, 3)
    assert torch.equal(buffer.kv[:, :, :, : buffer.length], kv[:, :, :, front:])


def test_a_full_buffer_refuses_and_stays_as_it_is():
    buffer, kv = filled(committed=5, pending=3)
    buffer.write(0, *PlainText(layers=1).draw(2)[0])
    with pytest.raises(IndexError, match="11 tokens do not fit a buffer of 10"):
        buffer.write(0, *PlainText(layers=1).draw(3)[0])
    assert torch.equal(buffer.kv[:, :, :, :8], kv)


@pytest.mark.parametrize("tokens", [-1, 4])
def test_commit_and_settle_take_pending_tokens_only(tokens):
    buffer, _ = filled(committed=5, pending=3)
    for act in (buffer.commit, buffer.settle):
        with pytest.raises(IndexError, match=f"{tokens} of 3 pending tokens"):
            act(tokens)
    assert (buffer.committed, buffer.pending) == (5, 3)


@pytest.mark.parametrize("tokens", [-1, 6])
def test_drop_front_takes_committed_tokens_only(tokens):
    buffer, kv = filled(committed=5, pending=3)
    with pytest.raises(IndexError, match=f"{tokens} of 5 committed tokens"):
        buffer.drop_front(tokens)
    assert torch.equal(buffer.kv[:, :, :, :8], kv)
