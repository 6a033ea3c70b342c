"""The caches as the two target levels use them: grow a tree, verify some of it, choose anew on the way, commit a path,
keep what was drafted behind it, and again. The levels are the real ones; the model is replaced by random keys, values
and queries for every layer, and every query's attention is worked out from plain lists.
"""

from __future__ import annotations

import random
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_triforce.cache.full import FullCache
from offload_triforce.cache.retrieval import RetrievalCache
from offload_triforce.cache.sizes import RetrievalShape
from offload_triforce.cache.target import TargetCaches
from offload_triforce.cache.window import WindowCache
from offload_triforce.kernels.ops import AttentionParams
from offload_triforce.runtime import levels
from offload_triforce.scheduler.emulated import EmulatedDevice
from offload_triforce.scheduler.pipeline import TileStream
from offload_triforce.scheduler.plan import TilePlan
from offload_triforce.scheduler.store import TileStore
from offload_triforce.speculation.tree import Node, TokenTree, ancestors, tree_mask
from tests.cache.chunk_choice import assert_best_choice, assert_holds, held_tokens
from tests.cache.plain_text import CPU, SCALING, PlainText
from tests.scheduler.devices import LateDevice
from tests.usual import first

GAMMA = 4  # longest accepted path
BLOCK = 9  # most tokens in a pass
ROOM = 24  # most tokens that the retrieval level holds
LIMIT = 400


class TargetRig:
    """All caches of a target beside a plain text that holds the target's own keys and values."""

    def __init__(
        self, windows, shape, tile, device=LateDevice, ring=2, resident=0.0, limit=LIMIT, seed=0, choosing="each pass"
    ):
        self.windows, self.shape, self.limit, self.choosing = windows, shape, limit, choosing
        self.chance = random.Random(seed)
        text = self.kv_text = PlainText(layers=len(windows))
        where = (text.dtype, CPU)
        count = windows.count(None)
        heads, news = (text.kv_heads, text.dim), GAMMA + 1
        full = retrieval = window = None
        self.device = device()
        if count:
            plan = TilePlan(count, *heads, 4, tile, -(-limit // tile), ring=ring, resident=resident)
            stream = TileStream(TileStore(plan, text.dtype, self.device), self.device, text.dtype)
            full = FullCache(stream, shape.tail_needed(news), BLOCK, news, *where)
            retrieval = RetrievalCache(count, *heads, shape, news, ROOM, *where, context=limit + 2 * BLOCK)
        if count < len(windows):
            window = WindowCache([w for w in windows if w], *heads, limit, BLOCK, *where, drafts=ROOM)
        groups = [[i for i, w in enumerate(windows) if (w is None) == everything] for everything in (True, False)]
        self.caches = TargetCaches(groups, full, retrieval, window)
        model = mock.Mock(device=CPU)
        self.target = levels.TargetLevel(model, self.caches, choosing)
        self.retrieval = levels.RetrievalLevel(model, self.caches)
        self.nested = self.moved = self.tokens = 0
        self.prompt(0)

    def close(self):
        self.device.close()

    def prompt(self, tokens):
        """Another text of that many tokens, and one more that nobody has read yet."""
        kv_text, caches, self.saved = self.kv_text, self.caches, None
        kv_text.clear()
        kv_text.append(kv_text.draw(tokens))
        kv_text.commit(tokens)
        caches.reset()
        if tokens:
            queries = kv_text.queries(min(tokens, 16))
            near = max(0, tokens - max(self.shape.recent, queries.shape[2]))
            for layer, window in enumerate(self.windows):
                place, kv = caches.place[layer], kv_text.kv[layer]
                caches.fill(layer, kv, queries[layer], AttentionParams(SCALING, window))
                if window is None:
                    assert_best_choice(
                        caches.retrieval, place, queries[layer], kv, near, tokens, near >= self.shape.sink
                    )
        caches.end_fill(tokens)
        self.tree, self.drafts, self.refreshed = TokenTree(Node(0, None)), {}, tokens
        self.check()

    def save(self):
        """A snapshot between two passes."""
        self.saved = self.caches.snapshot(), self.kv_text.kv, self.refreshed

    def back(self):
        """The text goes on from the snapshot, however it went on before. What was drafted is gone."""
        if self.saved is not None:
            snapshot, self.kv_text.kv, self.refreshed = self.saved
            self.caches.restore(snapshot)
            self.tree, self.drafts = TokenTree(Node(0, None)), {}
            self.check()

    def draft(self, most):
        """The retrieval level reads the root, or some unread nodes behind those that it has read."""
        held = self.tree.held
        new = [self.tree.root] if not held else []
        while held and len(new) < most and len(held) + len(new) < ROOM:
            parent = self.chance.choice([node for node in (*held, *new) if node.depth < 2 * GAMMA] or [None])
            if parent is None:
                break
            self.tokens += 1
            new.append(self.tree.add(parent, self.tokens, 0.5))
        if not new:
            return
        with mock.patch.object(levels, "run", self.run_middle):
            self.retrieval.score(new, held)
        held += new

    def forget(self, most):
        """The newest of what the retrieval level has read turn out to be no draft tokens."""
        held = self.tree.held
        gone = min(most, len(held) - 1)
        if gone > 0:
            dropped = set(held[-gone:])
            del held[-gone:]
            self.tree.draft_tokens = [node for node in self.tree.draft_tokens if node not in dropped]
            self.retrieval.keep(range(len(held)))

    def run_middle(self, _model, _tokens, positions, view, keep):
        kv_text, caches, length = self.kv_text, self.caches, len(self.kv_text)
        nodes = self.retrieval._nodes
        assert keep == len(nodes)
        kv, queries = kv_text.draw(len(nodes)), kv_text.queries(len(nodes))
        for number, node in enumerate(nodes):
            self.drafts[node] = kv[:, :, :, number : number + 1]
        before = length if not self.nested else length - len(self.target._nodes)  # the pass's own are not seen
        for layer, window in enumerate(self.windows):
            output = view.attend(layer, queries[layer], *kv[layer], AttentionParams(SCALING, window))
            held = kv_text.kv[layer][:, :, :before]
            if window is None and not self.nested:  # while a choice is being made, no list tells what is seen
                held = held_tokens(caches.retrieval, caches.place[layer], held, length, self.refreshed)
            elif window is None:
                assert bool(output.isfinite().all())
                continue
            self.compare(output, queries[layer], held, layer, window, nodes, self.drafts, before, positions)

    def compare(self, output, queries, held, layer, window, nodes, known, length, positions):
        """Each node sees what is held, its ancestors and itself, as far as the window reaches."""
        for number, (node, position) in enumerate(zip(nodes, positions, strict=True)):
            assert position == length + node.depth
            line = list(ancestors(node))[::-1]
            if window is not None:
                line = [other for other in line if node.depth - other.depth < window]
                first_seen = max(0, position - window + 1)
                seen = held[:, :, first_seen:]
            else:
                seen = held
            seen = torch.cat([seen, *(known[other][layer] for other in line)], dim=2)
            expected = attend_row(queries[:, number], seen)
            torch.testing.assert_close(output[:, number].double(), expected, rtol=1e-5, atol=1e-5)

    def verify(self, count, accepted, ahead):
        """The target reads a part of the tree, follows a path in it, and adds a token; meanwhile the tree may grow."""
        if len(self.kv_text) + 2 * BLOCK > self.limit:
            self.prompt(20)
            return
        tree, nodes = self.tree, [self.tree.root]
        for node in tree.draft_tokens:
            if (
                len(nodes) < min(count, BLOCK)
                and node.parent in nodes
                and node.depth <= GAMMA
                and self.chance.random() < 0.8
            ):
                nodes.append(node)

        def idle():
            if ahead and not self.nested and self.tree.held:
                self.nested = 1
                self.draft(ahead)
                self.nested = 0
                self.moved += 1

        with mock.patch.object(levels, "run", self.run_target):
            self.target.score(nodes, idle)
        path = [tree.root]
        while len(path) <= min(accepted, GAMMA):
            inside = [node for node in path[-1].children if node in nodes]
            if not inside:
                break
            path.append(self.chance.choice(inside))
        kept = [nodes.index(node) for node in path]
        self.move_on(path[-1])
        self.target.commit(kept)
        kv_text = self.kv_text
        self.refreshed = len(kv_text) - len(nodes)
        kv_text.kv = torch.cat([kv_text.kv[:, :, :, : self.refreshed], *(self.pending[node] for node in path)], dim=3)
        kv_text.pending = 0
        self.check()

    def move_on(self, last):
        """The token that the target adds was known, or is new."""
        tree = self.tree
        place = {node: number for number, node in enumerate(tree.held)}
        if last.children and self.chance.random() < 0.7:
            self.tree = tree.moved_to(self.chance.choice(last.children))
        else:
            self.tree = TokenTree(Node(0, None))
        self.retrieval.keep([place[node] for node in self.tree.held])

    def run_target(self, _model, _tokens, positions, view, keep):
        kv_text, caches, length = self.kv_text, self.caches, len(self.kv_text)
        nodes = self.target._nodes
        kv, queries = kv_text.draw(len(nodes)), kv_text.queries(len(nodes))
        self.pending = {node: kv[:, :, :, number : number + 1] for number, node in enumerate(nodes)}
        kv_text.append(kv)
        for layer, window in enumerate(self.windows):
            place, whole = caches.place[layer], kv_text.kv[layer]
            known = window is None and bool(caches.retrieval.chosen[place, 0, 0] >= 0)
            output = view.attend(layer, queries[layer], *kv[layer], AttentionParams(SCALING, window))
            self.compare(
                output, queries[layer], whole[:, :, :length], layer, window, nodes, self.pending, length, positions
            )
            if window is None and self.choosing == "each pass":
                tail, seen = caches.full.tiled, torch.from_numpy(tree_mask(nodes))
                assert_best_choice(caches.retrieval, place, queries[layer], whole, tail, length, known, seen)

    def check(self):
        caches, kv_text, length = self.caches, self.kv_text, len(self.kv_text)
        assert caches.length == length
        for layer, window in enumerate(self.windows):
            place, whole = caches.place[layer], kv_text.kv[layer]
            drafts = caches.retrieval if window is None else caches.window.drafts
            assert drafts.pending == len(self.tree.held)
            held = drafts.kv[place, :, :, drafts.committed : drafts.length]
            for number, node in enumerate(self.tree.held):
                assert torch.equal(held[:, :, number : number + 1], self.drafts[node][layer])
            if window is None:
                assert caches.full.pending == 0
                assert torch.equal(caches.full.read(place), whole)
                assert_holds(caches.retrieval, place, whole, length, self.refreshed)
            else:
                assert caches.window.pending == 0
                held = caches.window.settled[place]
                assert held.shape[2] >= min(length, window)
                assert torch.equal(held, whole[:, :, length - held.shape[2] :])

    def run(self, rounds):
        for name, *numbers in rounds:
            getattr(self, name)(*numbers)


def attend_row(query, kv):
    """One query [H, D] over all of ``kv`` [2, K, n, D], in float64: [H, D]."""
    key, value = kv.double().repeat_interleave(len(query) // kv.shape[1], dim=1)
    weights = torch.softmax((key @ query.double()[:, :, None])[..., 0] * SCALING, dim=-1)
    return (weights[:, None] @ value)[:, 0]


few = st.integers(0, GAMMA)
rounds = st.lists(
    st.one_of(
        st.tuples(st.just("draft"), st.integers(1, 5)),
        st.tuples(st.just("verify"), st.integers(1, BLOCK), few, st.integers(0, 3)),
        st.tuples(st.just("draft"), st.integers(1, 5)),
        st.tuples(st.just("verify"), st.integers(1, BLOCK), few, st.integers(0, 3)),
        st.tuples(st.just("forget"), st.integers(1, 4)),
        st.tuples(st.just("save")),
        st.tuples(st.just("back")),
        st.tuples(st.just("prompt"), st.integers(0, 150)),
    ),
    min_size=8,
    max_size=30,
)


@st.composite
def shapes(draw):
    chunk, recent = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    sink = chunk * draw(st.integers(0, 2))
    return RetrievalShape(sink + recent + chunk * draw(st.integers(1, 8)), chunk, sink, recent)


# The narrowest window is shorter than a tree is deep: there, not all draft tokens see all that they follow.
LAYERS = {"full": [None, None], "mixed": [6, None, 17, None], "sliding": [3, 17]}


@pytest.mark.parametrize("windows", LAYERS.values(), ids=LAYERS)
@given(shapes(), st.integers(2, 6), st.integers(1, 3), st.sampled_from([0.0, 0.4, 1.0]), rounds, st.integers(0, 99))
@settings(deadline=None, max_examples=15)
def test_levels_see_what_a_plain_list_says(windows, shape, chunks, ring, resident, rounds, seed):
    rig = TargetRig(windows, shape, tile=chunks * shape.chunk, ring=ring, resident=resident, seed=seed)
    rig.run(rounds)


@pytest.mark.parametrize("choosing", ["each pass", "once"])
def test_from_a_snapshot_a_text_goes_on_as_it_did_the_first_time(choosing):
    """Bit by bit, whatever came in between."""
    rig = TargetRig(LAYERS["mixed"], RetrievalShape(24, 4, 4, 8), tile=8, choosing=choosing)
    on = [("draft", 1), ("draft", 4), ("verify", BLOCK, GAMMA, 2)]
    for start in (40, 90):
        rig.run([("prompt", start), *on * 2, ("draft", 2), ("save",), ("back",)])
        luck, kv_luck = rig.chance.getstate(), rig.kv_text.random.get_state()
        rig.run(on * 4)
        once = rig.caches.snapshot()
        rig.run([*on * 3, ("draft", 3), ("back",)])
        rig.chance.setstate(luck)
        rig.kv_text.random.set_state(kv_luck)
        rig.run(on * 4)
        again = rig.caches.snapshot()
        assert int(once["length"]) > start + 4
        assert again.keys() == once.keys()
        assert [name for name in once if not torch.equal(once[name], again[name])] == []


@pytest.mark.parametrize("choosing", ["each pass", "once"])
@pytest.mark.parametrize("passes", first(1, [120, 300]))
def test_hundreds_of_passes(choosing, passes):
    chance = random.Random(0)
    shape = RetrievalShape(72, 4, 4, 16)
    rig = TargetRig([None, 5], shape, tile=128, device=EmulatedDevice, resident=0.4, limit=2000, choosing=choosing)
    rig.prompt(200)
    for _ in range(passes):
        for _ in range(chance.randint(0, 3)):
            rig.draft(chance.randint(1, 5))
        rig.verify(chance.randint(1, BLOCK), chance.randint(0, GAMMA), chance.randint(0, 2))
    assert len(rig.kv_text) > 200 + passes
    rig.close()


def test_the_tree_grows_while_a_pass_is_under_way():
    """Late copies have never arrived when they are looked for, so there is always time."""
    rig = TargetRig(LAYERS["mixed"], RetrievalShape(24, 4, 4, 8), tile=8)
    rig.run([("prompt", 90), ("draft", 1), ("draft", 3), ("verify", 4, 2, 2), ("verify", 4, 2, 2)])
    assert rig.moved > 10


def test_chosen_once_the_choice_is_kept():
    """But for chunks that leave the recent window, which take the place of those wanted least."""
    rig = TargetRig([None], RetrievalShape(24, 4, 4, 8), tile=8, choosing="once")
    rig.prompt(150)
    first = rig.caches.retrieval.chosen.clone()
    scores = rig.caches.retrieval.scores.clone()
    for _ in range(12):
        rig.draft(1)
        rig.draft(4)
        rig.verify(BLOCK, GAMMA, 0)
        chosen = rig.caches.retrieval.chosen
        for head in range(chosen.shape[1]):
            old = set(first[0, head].tolist()) & set(chosen[0, head].tolist())
            new = set(chosen[0, head].tolist()) - old
            assert new == set(range(shape_end(rig, 150), shape_end(rig, rig.refreshed))) - set(first[0, head].tolist())
            gone = [scores[0, head, i] for i, c in enumerate(first[0, head].tolist()) if c not in old]
            kept = [scores[0, head, i] for i, c in enumerate(first[0, head].tolist()) if c in old]
            assert max(gone, default=-1e9) <= min(kept, default=1e9)
        if len(rig.kv_text) > 158:
            break
    assert not torch.equal(first, rig.caches.retrieval.chosen)


def test_chosen_once_the_newest_stay_when_all_slots_have_been_taken():
    """A long answer fills the slots with itself: what has just left the recent window must never be what is missing."""
    rig = TargetRig([None], RetrievalShape(24, 4, 4, 8), tile=8, choosing="once")
    rig.prompt(50)
    while len(rig.kv_text) < 120:
        rig.draft(1)
        rig.draft(4)
        rig.verify(BLOCK, GAMMA, 0)
        end = shape_end(rig, rig.refreshed)
        for head in rig.caches.retrieval.chosen[0].tolist():
            assert set(range(max(shape_end(rig, 50), end - 3), end)) <= set(head)


def shape_end(rig, length):
    return rig.shape.pool(length).stop


def test_choosing_costs_no_link_bytes():
    """A pass fetches each streamed tile once, and a refresh is made of what it fetches anyway."""
    rig = TargetRig([None, None], RetrievalShape(24, 4, 4, 8), tile=8)
    rig.prompt(100)
    to_host, to_device = rig.device.outgoing, rig.device.incoming
    full = rig.caches.full
    assert full.tiles == (100 - full.keep) // 8
    assert (to_host.moved, to_device.moved) == (2 * full.tiles * full.stream.plan.tile_bytes, 0)
    rig.run([("draft", 1), ("draft", 2)])
    assert to_device.moved == 0, "drafting does without the link"
    rig.run([("verify", 3, 2, 2)])
    assert to_device.moved == 2 * full.tiles * full.stream.plan.tile_bytes
