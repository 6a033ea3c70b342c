"""The static view against the growing buffer itself, its work recorded once and run again as a CUDA graph would."""

from __future__ import annotations

import random

import pytest
import torch

from offload_triforce.cache.buffer import GrowingBuffer
from offload_triforce.cache.static import StaticView
from offload_triforce.kernels import ops
from tests.model.replay import ReplayCapture

CPU = torch.device("cpu")
LAYERS, HEADS, DIM, GROUPS = 2, 2, 4, 3
RULES = {
    "full": ops.Rule(0.5),
    "softcap": ops.Rule(0.5, softcap=3.0),
    "window": ops.Rule(0.5, window=9),
    "narrow window": ops.Rule(0.5, window=2),
}


def make_buffer(capacity, dtype=torch.float32):
    """Behind what is held lies what would be noticed."""
    buffer = GrowingBuffer(LAYERS, HEADS, capacity, DIM, dtype, CPU)
    buffer.kv.fill_(1e4)
    return buffer


class Recorded:
    """Steps of T tokens through all layers of one buffer: recorded at the first, replayed from then on."""

    def __init__(self, buffer, tokens, rule, view=StaticView):
        self.view = view([buffer], lambda layer, _: (buffer, layer), tokens)
        self.held = torch.zeros(1, dtype=torch.long)
        self.query = torch.zeros(LAYERS, HEADS * GROUPS, tokens, DIM)
        self.key, self.value = torch.zeros(2, LAYERS, HEADS, tokens, DIM)
        self.rule, self.replay = rule, None

    def step(self):
        self.view.begin(self.held)
        layers = zip(self.query, self.key, self.value, strict=True)
        return torch.stack([self.view.attend(i, *tensors, self.rule) for i, tensors in enumerate(layers)])

    def __call__(self, query, key, value):
        self.held.copy_(torch.tensor(self.view.held()))
        for own, given in ((self.query, query), (self.key, key), (self.value, value)):
            own.copy_(given)
        if self.replay is None:
            self.replay = ReplayCapture()(self.step)
        return self.replay()


class Twins:
    """Two buffers led through the same life: one by recorded steps, one by ``GrowingBuffer.attend``."""

    def __init__(self, rule, capacity=40, seed=0, view=StaticView):
        self.static, self.plain = make_buffer(capacity), make_buffer(capacity)
        self.rule, self.chance, self.view = rule, random.Random(seed), view
        self.recorded = {}

    def step(self, tokens):
        query = torch.randn(LAYERS, HEADS * GROUPS, tokens, DIM)
        key, value = torch.randn(2, LAYERS, HEADS, tokens, DIM)
        if tokens not in self.recorded:
            self.recorded[tokens] = Recorded(self.static, tokens, self.rule, self.view)
        output = self.recorded[tokens](query, key, value)
        expected = [self.plain.attend(i, query[i], key[i], value[i], self.rule) for i in range(LAYERS)]
        torch.testing.assert_close(output, torch.stack(expected), atol=1e-5, rtol=1e-5)
        for buffer in (self.static, self.plain):
            buffer.end_step(tokens)
        end = self.plain.length
        assert torch.equal(self.static.kv[:, :, :, :end], self.plain.kv[:, :, :, :end])

    def settle(self):
        """Guesses are taken back or accepted, and the front is forgotten when there is no room."""
        pending, kept = self.plain.pending, self.chance.randint(0, self.plain.pending)
        move = self.chance.choice(["keep", "commit", "rollback", "go on"])
        for buffer in (self.static, self.plain):
            if move == "keep":
                buffer.keep_pending(kept)
            elif move == "commit":
                buffer.commit(kept)
            elif move == "rollback" and pending:
                buffer.rollback()
            if buffer.capacity - buffer.length < 8:
                buffer.commit(buffer.pending)
                buffer.drop_front(buffer.length - self.rest)

    def live(self, steps):
        torch.manual_seed(0)
        for _ in range(steps):
            self.rest = self.chance.randint(9, 20)
            self.step(self.chance.choice([1, 1, 2, 3, 5]))
            self.settle()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_growing_buffer(rule, seed):
    """Through rollbacks and moves to the front, whatever was held when the step was recorded."""
    twins = Twins(rule, seed=seed)
    twins.live(300)
    assert sorted(twins.recorded) == [1, 2, 3, 5]


class BakedLength(StaticView):
    def begin(self, held):
        super().begin(torch.tensor(self.held()))


class BakedPlaces(StaticView):
    def begin(self, held):
        super().begin(held)
        places = torch.arange(self.buffers[0].length, self.buffers[0].length + self.tokens)
        self._ends = {buffer: (places, newest) for buffer, (_, newest) in self._ends.items()}


class BakedShape(StaticView):
    def attend(self, layer, query, key, value, rule):
        buffer = self.buffers[0]
        return buffer.attend(layer, query, key, value, rule)


@pytest.mark.parametrize("view", [BakedLength, BakedPlaces, BakedShape])
def test_a_number_of_the_host_would_be_noticed(view):
    """Else the tests above would say nothing."""
    with pytest.raises(AssertionError):
        Twins(RULES["full"], view=view).live(50)


def test_each_layer_finds_its_buffer():
    """Full layers in one buffer, sliding ones in another that holds another number of tokens."""
    long, short = make_buffer(60), make_buffer(30)
    plain = make_buffer(60), make_buffer(30)
    rules = ops.Rule(0.5), ops.Rule(0.5, window=7)

    def find(layer, rule):
        return (long, layer) if rule.window is None else (short, layer - 1)

    for buffer, held in zip((long, short, *plain), (33, 12, 33, 12), strict=True):
        torch.manual_seed(held)
        buffer.kv[:, :, :, :held] = torch.randn(LAYERS, 2, HEADS, held, DIM)
        buffer.end_step(held)
    view = StaticView([long, short], find, 4)
    view.begin(torch.tensor(view.held()))
    for layer, (rule, other) in enumerate(zip(rules, plain, strict=True)):
        query, (key, value) = torch.randn(HEADS * GROUPS, 4, DIM), torch.randn(2, HEADS, 4, DIM)
        output = view.attend(layer, query, key, value, rule)
        torch.testing.assert_close(output, other.attend(0, query, key, value, rule), atol=1e-5, rtol=1e-5)
    assert torch.equal(long.kv[0, :, :, :37], plain[0].kv[0, :, :, :37])
    assert torch.equal(short.kv[0, :, :, :16], plain[1].kv[0, :, :, :16])


def test_refuses_what_does_not_fit():
    buffer = make_buffer(10)
    buffer.end_step(7)
    view = StaticView([make_buffer(20), buffer], lambda layer, _: (buffer, layer), 4)
    with pytest.raises(IndexError, match="11 tokens do not fit a buffer of 10"):
        view.held()
    buffer.keep_pending(6)
    assert view.held() == [4, 10]


def test_keys_of_another_dtype_are_stored_in_the_buffers():
    buffer = make_buffer(10, torch.bfloat16)
    view = StaticView([buffer], lambda layer, _: (buffer, layer), 2)
    view.begin(torch.tensor(view.held()))
    key, value = torch.randn(2, HEADS, 2, DIM)
    view.attend(0, torch.randn(HEADS * GROUPS, 2, DIM), key, value, ops.Rule(1.0))
    assert torch.equal(buffer.kv[0, 0, :, :2], key.bfloat16())
