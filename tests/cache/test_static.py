"""The static view against the growing buffer itself, its work recorded once and run again as a CUDA graph would."""

from __future__ import annotations

import random

import pytest
import torch

from offload_triforce.cache.buffer import GrowingBuffer, TreeStep
from offload_triforce.cache.chunks import make_store
from offload_triforce.cache.static import Held, StaticView
from offload_triforce.kernels import ops
from tests.graphs.replay import ReplayCapture
from tests.usual import first

CPU = torch.device("cpu")
LAYERS, HEADS, DIM, GROUPS = 2, 2, 4, 3
SIGHT = 12  # most tokens pending
RULES = {
    "full": ops.AttentionParams(0.5),
    "softcap": ops.AttentionParams(0.5, softcap=3.0),
    "window": ops.AttentionParams(0.5, window=9),
    "narrow window": ops.AttentionParams(0.5, window=2),
}


def make_buffer(capacity, dtype=torch.float32):
    """Behind what is held lies what would be noticed."""
    buffer = GrowingBuffer(LAYERS, HEADS, capacity, DIM, dtype, CPU)
    buffer.kv.fill_(1e4)
    return buffer


class Recorded:
    """Steps of T tokens through all layers of one buffer: recorded at the first, replayed from then on."""

    def __init__(self, buffer, tokens, params, view=StaticView):
        self.view = view([buffer], lambda layer, _: Held(None, buffer, layer), tokens, SIGHT)
        self.held = torch.zeros(sum(self.view.sizes), dtype=torch.long)
        self.mask = torch.ones(tokens, SIGHT, dtype=torch.bool)
        self.depths = torch.zeros(tokens, dtype=torch.long)
        self.query = torch.zeros(LAYERS, HEADS * GROUPS, tokens, DIM)
        self.key, self.value = torch.zeros(2, LAYERS, HEADS, tokens, DIM)
        self.params, self.replay = params, None

    def step(self):
        self.view.begin(self.held, self.mask, self.depths)
        layers = zip(self.query, self.key, self.value, strict=True)
        return torch.stack([self.view.attend(i, *tensors, self.params) for i, tensors in enumerate(layers)])

    def __call__(self, query, key, value, step):
        self.held.copy_(torch.tensor(self.view.held()))
        self.mask.fill_(True)
        self.mask[:, SIGHT - step.mask.shape[1] :] = step.mask
        for own, given in ((self.query, query), (self.key, key), (self.value, value), (self.depths, step.depths)):
            own.copy_(given)
        if self.replay is None:
            self.replay = ReplayCapture()(self.step)
        return self.replay()


class Twins:
    """Two buffers led through the same life: one by recorded steps, one by ``GrowingBuffer.attend``."""

    def __init__(self, params, capacity=40, seed=0, view=StaticView):
        self.static, self.plain = make_buffer(capacity), make_buffer(capacity)
        self.params, self.chance, self.view = params, random.Random(seed), view
        self.recorded, self.parents = {}, []

    def tree_step(self, tokens):
        """Each new token follows one of those pending, or none of them."""
        for _ in range(tokens):
            self.parents.append(self.chance.choice([-1, *range(len(self.parents))]))
        lines = []
        for node in range(len(self.parents)):
            lines.append([node] if self.parents[node] < 0 else [*lines[self.parents[node]], node])
        mask = torch.zeros(tokens, len(lines), dtype=torch.bool)
        for row, line in enumerate(lines[-tokens:]):
            mask[row, line] = True
        return TreeStep(mask, torch.tensor([len(line) - 1 for line in lines[-tokens:]]))

    def step(self, tokens):
        query = torch.randn(LAYERS, HEADS * GROUPS, tokens, DIM)
        key, value = torch.randn(2, LAYERS, HEADS, tokens, DIM)
        if tokens not in self.recorded:
            self.recorded[tokens] = Recorded(self.static, tokens, self.params, self.view)
        step = self.tree_step(tokens)
        output = self.recorded[tokens](query, key, value, step)
        expected = [self.plain.attend(i, query[i], key[i], value[i], self.params, step) for i in range(LAYERS)]
        torch.testing.assert_close(output, torch.stack(expected), atol=1e-5, rtol=1e-5)
        for buffer in (self.static, self.plain):
            buffer.end_step(tokens)
        end = self.plain.length
        assert torch.equal(self.static.kv[:, :, :, :end], self.plain.kv[:, :, :, :end])

    def settle(self):
        """Draft tokens are taken back or accepted, and the front is forgotten when there is no room."""
        pending, kept = self.plain.pending, self.chance.randint(0, self.plain.pending)
        move = self.chance.choice(["keep", "commit", "rollback", "go on"])
        if pending > SIGHT - 5:
            move = "commit"
        for buffer in (self.static, self.plain):
            if move == "keep":
                buffer.select(range(kept))
            elif move == "commit":
                buffer.commit(kept)
            elif move == "rollback" and pending:
                buffer.commit(0)
            if buffer.capacity - buffer.length < 8:
                buffer.commit(buffer.pending)
                buffer.drop_front(buffer.length - self.rest)
        self.parents = self.parents[: self.plain.pending]

    def live(self, steps):
        torch.manual_seed(0)
        for _ in range(steps):
            self.rest = self.chance.randint(9, 20)
            self.step(self.chance.choice([1, 1, 2, 3, 5]))
            self.settle()


@pytest.mark.parametrize("params", RULES.values(), ids=RULES)
@pytest.mark.parametrize("seed", first(1, range(3)))
def test_equals_the_growing_buffer(params, seed):
    """Through rollbacks and moves to the front, whatever was held when the step was recorded."""
    twins = Twins(params, seed=seed)
    twins.live(150)
    assert sorted(twins.recorded) == [1, 2, 3, 5]


class BakedLength(StaticView):
    def begin(self, held, mask, depths):
        super().begin(torch.tensor(self.held()), mask, depths)


class BakedMask(StaticView):
    def begin(self, held, mask, depths):
        super().begin(held, torch.tensor(mask.tolist()), depths)


class BakedDepths(StaticView):
    def begin(self, held, mask, depths):
        super().begin(held, mask, torch.tensor(depths.tolist()))


class BakedPlaces(StaticView):
    def begin(self, held, mask, depths):
        super().begin(held, mask, depths)
        end = torch.tensor([self.buffers[0].length + self.tokens])
        self._ends = {buffer: (end, committed) for buffer, (_, committed) in self._ends.items()}


class BakedShape(StaticView):
    def attend(self, layer, query, key, value, params):
        buffer = self.buffers[0]
        return buffer.attend(layer, query, key, value, params)


@pytest.mark.parametrize("view", [BakedLength, BakedMask, BakedDepths, BakedPlaces, BakedShape])
def test_a_number_of_the_host_would_be_noticed(view):
    """Else the tests above would say nothing."""
    with pytest.raises(AssertionError):
        Twins(RULES["narrow window" if view is BakedDepths else "full"], view=view).live(50)


def test_each_layer_finds_its_buffer():
    """Full layers in one buffer, sliding ones in another that holds another number of tokens."""
    long, short = make_buffer(60), make_buffer(30)
    plain = make_buffer(60), make_buffer(30)
    both = ops.AttentionParams(0.5), ops.AttentionParams(0.5, window=7)

    def find(layer, params):
        return Held(None, long, layer) if params.window is None else Held(None, short, layer - 1)

    for buffer, held in zip((long, short, *plain), (33, 12, 33, 12), strict=True):
        torch.manual_seed(held)
        buffer.kv[:, :, :, :held] = torch.randn(LAYERS, 2, HEADS, held, DIM)
        buffer.end_step(held)
        buffer.commit(held)
    view = StaticView([long, short], find, 4, 4)
    view.begin(torch.tensor(view.held()), torch.ones(4, 4).tril() > 0, torch.arange(4))
    for layer, (params, other) in enumerate(zip(both, plain, strict=True)):
        query, (key, value) = torch.randn(HEADS * GROUPS, 4, DIM), torch.randn(2, HEADS, 4, DIM)
        output = view.attend(layer, query, key, value, params)
        torch.testing.assert_close(output, other.attend(0, query, key, value, params), atol=1e-5, rtol=1e-5)
    assert torch.equal(long.kv[0, :, :, :37], plain[0].kv[0, :, :, :37])
    assert torch.equal(short.kv[0, :, :, :16], plain[1].kv[0, :, :, :16])


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("filled", [0, 2, 5])
def test_chosen_chunks_count_as_far_as_the_device_says(bits, filled):
    """A store is read in full, and what is not filled is left out."""
    store = make_store(1, HEADS, 5, 3, DIM, bits, torch.float32, CPU)
    order = torch.arange(5).expand(HEADS, 5)
    ops.put_chunks(order, torch.randn(2, HEADS, 15, DIM), store.slots(0))
    buffer, plain = make_buffer(9), make_buffer(9)
    query, (key, value) = torch.randn(HEADS * GROUPS, 2, DIM), torch.randn(2, HEADS, 2, DIM)

    def read(attention, depths, counts):
        store.attend_static(attention, 0, counts[0])

    view = StaticView([buffer], lambda layer, params: Held(read, buffer, 0), 2, 2, [lambda: filled * 3])
    view.begin(torch.tensor(view.held()), torch.ones(2, 2).tril() > 0, torch.arange(2))
    output = view.attend(0, query, key, value, RULES["full"])
    attention = ops.RunningAttention()
    attention.start(query, HEADS, RULES["full"])
    if filled:
        store.attend_on(attention, 0, filled)
    plain.attend_on(attention, 0, key, value, RULES["full"])
    torch.testing.assert_close(output, attention.finish(), atol=1e-5, rtol=1e-5)


def test_refuses_what_does_not_fit():
    buffer = make_buffer(10)
    buffer.end_step(7)
    view = StaticView([make_buffer(20), buffer], lambda layer, _: Held(None, buffer, layer), 4, 4)
    with pytest.raises(IndexError, match="11 tokens do not fit a buffer of 10"):
        view.held()
    buffer.select(range(6))
    assert view.held() == [4, 10, 0, 0]


def test_keys_of_another_dtype_are_stored_in_the_buffers():
    buffer = make_buffer(10, torch.bfloat16)
    view = StaticView([buffer], lambda layer, _: Held(None, buffer, layer), 2, 2)
    view.begin(torch.tensor(view.held()), torch.ones(2, 2).tril() > 0, torch.arange(2))
    key, value = torch.randn(2, HEADS, 2, DIM)
    view.attend(0, torch.randn(HEADS * GROUPS, 2, DIM), key, value, ops.AttentionParams(1.0))
    assert torch.equal(buffer.kv[0, 0, :, :2], key.bfloat16())
