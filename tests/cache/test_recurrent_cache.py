"""Recurrent layers over a tree: each node reads what its own path, run alone, would; draft tokens leave no trace."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_triforce.cache.layer import CacheLayers
from offload_triforce.cache.recurrent import NodeView, RecurrentCache
from offload_triforce.cache.sizes import RecurrentShape
from offload_triforce.kernels import ops
from tests.kernels.delta_trees import (
    Sizes,
    draw_convolution,
    draw_tokens,
    mask_of,
    paths,
    plain_convolution,
    plain_rule,
    random_parents,
    take,
)
from tests.usual import first

LAYERS, ROOM = 2, 64
SIZES = Sizes()
CPU = torch.device("cpu")
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


def make_cache(block=ROOM, drafts=ROOM):
    return RecurrentCache(LAYERS, RecurrentShape(*SIZES), block, drafts, torch.float32, CPU)


class Text:
    """What layers are asked of some tokens, the same whichever level asks."""

    def __init__(self, tokens, seed):
        self.rules = [draw_tokens(tokens, SIZES, seed + i) for i in range(LAYERS)]
        self.convolutions = [draw_convolution(tokens, SIZES, seed + 10 + i) for i in range(LAYERS)]

    def read(self, nodes, rows, mask, end_step=None):
        """The outputs of both operations, per layer, of some tokens in one step. ``end_step``: of the whole cache."""
        view = NodeView(nodes)
        view.begin(nodes.step(mask))
        outputs = []
        for rule, convolution in zip(self.rules, self.convolutions, strict=True):
            part = convolution._replace(inputs=convolution.inputs[list(rows)])
            outputs.append((view.convolve(part), view.recur(take(rule, rows))))
        (end_step or nodes.end_step)(len(rows))
        return outputs

    def expected(self, path):
        """The same of the last token of a path, from the beginning of the text."""
        tail = torch.zeros(SIZES.taps - 1, SIZES.channels)
        state = torch.zeros(SIZES.value_heads, SIZES.key_dim, SIZES.value_dim)
        return [
            (plain_convolution(convolution, tail, path)[-1], *(x[-1] for x in plain_rule(take(rule, path), state)[:1]))
            for rule, convolution in zip(self.rules, self.convolutions, strict=True)
        ]

    def state(self, path):
        state = torch.zeros(SIZES.value_heads, SIZES.key_dim, SIZES.value_dim)
        return torch.stack([plain_rule(take(rule, path), state)[1] for rule in self.rules]).float()


def assert_reads(text, outputs, path_of):
    for place, path in enumerate(path_of):
        for (convolved, read), (expected, answer) in zip(outputs, text.expected(path), strict=True):
            torch.testing.assert_close(convolved[place].double(), expected, **CLOSE)
            torch.testing.assert_close(read[place].double(), answer, **CLOSE)


def test_it_keeps_the_protocol():
    assert isinstance(make_cache(), CacheLayers)


@pytest.mark.parametrize("nodes", [1, 2, 17, 48])
def test_a_tree_in_one_step(nodes):
    text, parents, cache = Text(nodes, seed=nodes), random_parents(nodes, nodes), make_cache()
    assert_reads(text, text.read(cache.nodes, range(nodes), mask_of(parents)), paths(parents))


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_rounds_of_drafting_and_verdicts(data):
    """Level 1 reads in steps and level 2 in one; what level 1 has read ahead counts from where the text then is."""
    parents = random_parents(data.draw(st.integers(4, 40)), data.draw(st.integers(0, 99)))
    text, lines, cache = Text(len(parents), seed=3), paths(parents), make_cache()
    committed, root, held = [], 0, []
    while True:
        below = [n for n in range(root, len(parents)) if root in lines[n]]
        left = [n for n in below if n not in held]
        while left:  # level 1, in steps
            rows = left[: data.draw(st.integers(1, 7))]
            seen = mask_of(parents, [*held, *rows])[len(held) :]
            assert_reads(text, text.read(cache.drafts, rows, seen), [lines[n] for n in rows])
            held, left = held + rows, left[len(rows) :]
            if data.draw(st.booleans()):
                break
        judged = [n for n in below if all(a in held or a in committed for a in lines[n])]
        outputs = text.read(cache.nodes, judged, mask_of(parents, judged))
        assert_reads(text, outputs, [lines[n] for n in judged])
        last = data.draw(st.sampled_from(judged))
        path = [n for n in lines[last] if n not in committed]
        ahead = [n for n in held if parents[n] == last]
        if ahead:  # the drafter first, as in a round: what hangs below its root stays
            root = ahead[0]
            stay = [n for n in held if root in lines[n]]
            cache.drafts.select([held.index(n) for n in stay])
            held = stay
        cache.select([judged.index(n) for n in path])
        cache.commit(len(path))
        committed += path
        torch.testing.assert_close(cache.state, text.state(committed), **CLOSE)
        assert cache.pending == 0
        if not ahead:
            return


def test_dropped_tokens_leave_no_trace():
    text, cache = Text(30, seed=5), make_cache()
    text.read(cache.nodes, range(6), mask_of([-1, 0, 1, 2, 3, 4]), cache.end_step)
    cache.commit(6)
    before = {name: part.clone() for name, part in cache.snapshot().items()}
    text.read(cache.nodes, range(6, 30), mask_of([-1, *range(23)]), cache.end_step)
    cache.commit(0)
    assert all(torch.equal(part, before[name]) for name, part in cache.snapshot().items())
    assert not any(
        part.any() for part in (cache.nodes.keys, cache.nodes.updates, cache.nodes.gates, cache.nodes.decays)
    )


def test_settled_tokens_go_and_the_others_stay():
    """As a draft model's cache does: the older part of a chain is decided."""
    text, cache = Text(20, seed=2), make_cache()
    chain = [-1, *range(19)]
    text.read(cache.nodes, range(9), mask_of(chain[:9]))
    cache.settle(4)
    torch.testing.assert_close(cache.state, text.state(range(4)), **CLOSE)
    seen = torch.ones(3, 8, dtype=torch.bool).tril(5)
    assert_reads(text, text.read(cache.nodes, range(9, 12), seen), [list(range(n + 1)) for n in range(9, 12)])


def test_snapshot_and_restore():
    text, cache = Text(12, seed=8), make_cache()
    text.read(cache.nodes, range(5), mask_of([-1, 0, 1, 2, 3]))
    cache.commit(5)
    kept = cache.snapshot()
    first = text.read(cache.nodes, range(5, 12), mask_of([-1, *range(6)]))
    cache.commit(7)
    text.read(cache.drafts, range(2), mask_of([-1, 0]))
    cache.restore(kept)
    assert cache.drafts.length == 0
    again = text.read(cache.nodes, range(5, 12), mask_of([-1, *range(6)]))
    assert all(
        torch.equal(a, b) for one, other in zip(first, again, strict=True) for a, b in zip(one, other, strict=True)
    )
    cache.reset()
    assert_reads(text, text.read(cache.nodes, [0], mask_of([-1])), [[0]])


@pytest.mark.parametrize("tokens", [1, 5])
def test_steps_of_fixed_work_see_the_same(tokens):
    """Over all rows, with their places told by the device."""
    text, parents = Text(24, seed=tokens), random_parents(24, tokens)
    cache, twin = make_cache(), make_cache()
    for start in range(0, 20, tokens):
        rows = range(start, start + tokens)
        whole = mask_of(parents, range(start + tokens))[start:]
        expected = text.read(twin.nodes, rows, whole)
        newest = min(16, start + tokens)
        padded = torch.ones(tokens, 16, dtype=torch.bool)
        padded[:, 16 - newest :] = whole[:, -newest:]
        if start + tokens > 16 and not whole[:, : start + tokens - 16].all():
            return  # such steps are for chains alone
        view = NodeView(cache.nodes)
        view.begin(cache.nodes.static_step(padded, torch.arange(start, start + tokens)))
        for rule, convolution, (convolved, read) in zip(text.rules, text.convolutions, expected, strict=True):
            part = convolution._replace(inputs=convolution.inputs[list(rows)])
            torch.testing.assert_close(view.convolve(part), convolved)
            torch.testing.assert_close(view.recur(take(rule, rows)), read)
        cache.nodes.end_step(tokens)


def test_what_does_not_fit_is_refused():
    cache, text = make_cache(block=4), Text(8, seed=1)
    with pytest.raises(IndexError, match="5 tokens do not fit a buffer of 4"):
        text.read(cache.nodes, range(5), mask_of([-1, 0, 1, 2, 3]))
    text.read(cache.nodes, range(3), mask_of([-1, 0, 1]))
    for wrong in ([2, 1], [3], [-1], [0, 0]):
        with pytest.raises(IndexError, match="cannot keep"):
            cache.select(wrong)
    with pytest.raises(IndexError, match="cannot accept 4 of 3"):
        cache.commit(4)


def test_bytes_are_what_the_shape_says():
    cache, shape = make_cache(block=10, drafts=6), RecurrentShape(*SIZES)
    nodes = [
        part for side in (cache.nodes, cache.drafts) for part in (side.keys, side.updates, side.gates, side.decays)
    ]
    held = sum(part.nbytes for part in [*nodes, cache.state, cache.nodes.inputs, cache.drafts.inputs])
    assert held == LAYERS * (shape.state_bytes(4) + 16 * shape.node_bytes(4))


@pytest.mark.parametrize("tokens", first(1, [2000, 5000]))
def test_many_tokens_without_drift(tokens):
    """Thousands of tokens in blocks: the state stays that of the plain recurrence."""
    cache = make_cache(block=50)
    text = Text(tokens, seed=4)
    for start in range(0, tokens, 50):
        text.read(cache.nodes, range(start, start + 50), ops.causal_mask(50, 50))
        cache.commit(50)
    expected = text.state(range(tokens))
    assert (cache.state - expected).norm() <= 1e-5 * expected.norm()
