"""Ways to choose for the retrieval cache: what is measured is what the caches do, and the arithmetic is right."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import retrieval_study as retrieval
from benchmarks.retrieval import app
from benchmarks.retrieval_figures import DRAWS, TEMPERATURES, Tally, Target, chain_yield, make_row
from benchmarks.retrieval_level import (
    ChosenLevel,
    FullText,
    apportion,
    attention_shares,
    largest_gains,
    layer_slots,
)
from benchmarks.retrieval_study import measure
from benchmarks.retrieval_ways import (
    BLOCK,
    MULTIPLES,
    Asking,
    Way,
    best,
    chunk_scores,
    chunk_wishes,
    make_ways,
    same_memory,
)
from offload_triforce.bench.speculation import equal_memory
from offload_triforce.cache.sizes import RetrievalShape
from offload_triforce.config import Settings
from offload_triforce.errors import InputError
from offload_triforce.kernels import ops
from offload_triforce.model.adapter import attached
from offload_triforce.model.layout import probe
from offload_triforce.runtime.levels import TargetLevel
from offload_triforce.runtime.reading import Reading
from offload_triforce.runtime.runtime import Runtime
from offload_triforce.runtime.session import Session
from offload_triforce.speculation.tree import chain
from tests.byte_tokenizer import byte_tokenizer, save_tiny_llama
from tests.tiny import prompt_ids, tiny_model

READ, GO_ON = 200, 3 * BLOCK
SHAPE = RetrievalShape(budget=4 + 20 + 4 * 6, chunk=4, sink=4, recent=20)
ALL = replace(SHAPE, budget=400)


def silent(line):
    pass


class Rig:
    """A tiny model, a text it has read, and what follows."""

    def __init__(self, family="mistral"):
        self.model = tiny_model(family, calm=True)
        self.layout = probe(self.model)
        self.ids = prompt_ids(READ + GO_ON)[0].tolist()
        self.reading = Reading.of(self.model, self.layout, self.ids[:READ])

    def text(self):
        return FullText(self.model, self.layout, self.reading, GO_ON)

    def measure(self, *ways):
        """Levels and tallies."""
        with attached(self.model), torch.no_grad():
            text = self.text()
            levels = [ChosenLevel(way, text) for way in ways]
            return levels, measure(text, self.ids[READ:], levels, silent)


@pytest.fixture(scope="module")
def rig():
    return Rig()


def mean(values):
    return sum(values) / len(values)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_the_full_text_says_what_the_model_says(family):
    rig = Rig(family)
    with attached(rig.model), torch.no_grad():
        text = rig.text()
        logits = torch.cat([text.step(rig.ids[i : i + BLOCK]) for i in range(READ, READ + GO_ON, BLOCK)])
    with torch.no_grad():
        expected = rig.model(torch.tensor([rig.ids])).logits[0, READ:]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    for shares in text.shares:
        torch.testing.assert_close(shares.sum(1), torch.ones(len(shares)))


@pytest.mark.parametrize("changes", [{}, {"when": "once"}, {"layers": "gain"}, {"key": "bounds", "fold": "share"}])
def test_with_room_for_everything_all_is_recovered(rig, changes):
    _, [tally] = rig.measure(Way("all", "", ALL, **changes))
    assert tally.mass == pytest.approx([1.0] * 3, abs=1e-5)
    for overlap in tally.overlap.values():
        assert overlap == pytest.approx([1.0] * GO_ON, abs=1e-4)
    assert tally.greedy == [1.0] * GO_ON
    assert torch.cat(tally.ranks[1.0])[:, 0].tolist() == [1.0] * GO_ON
    assert chain_yield(tally.overlap[1.0], 32) == pytest.approx(33, abs=0.1)


def test_room_for_nearly_everything_is_not_everything(rig):
    _, [tally] = rig.measure(Way("less", "", replace(ALL, budget=READ - 40)))
    assert all(mass < 0.999 for mass in tally.mass)
    assert mean(tally.overlap[1.0]) < 0.999


def test_mass_by_hand():
    """Two heads on one KV head, five keys on one axis, one query each: softmax of 0, ln 2, ln 3, ln 2, 0."""
    key = torch.tensor([0.0, math.log(2), math.log(3), math.log(2), 0.0])[None, :, None]
    query = torch.tensor([[[1.0]], [[0.0]]])  # the second head looks everywhere alike
    weights, shares = attention_shares(query, key, ops.AttentionParams(1.0))
    torch.testing.assert_close(weights[0, 0] * 9, torch.tensor([1.0, 2.0, 3.0, 2.0, 1.0]))
    torch.testing.assert_close(shares[0], (torch.tensor([1.0, 2.0, 3.0, 2.0, 1.0]) / 9 + 0.2) / 2)


def test_newer_tokens_are_not_seen():
    weights, _ = attention_shares(torch.zeros(1, 2, 3), torch.zeros(1, 4, 3), ops.AttentionParams(1.0))
    torch.testing.assert_close(weights[0], torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0], [0.25] * 4]))


def test_held_mass_is_that_of_the_tokens_held(rig):
    """Counted position by position, for a choice that differs from head to head."""
    [level], tallies = rig.measure(Way("default", "", SHAPE))
    before, total = READ + GO_ON - 2 * BLOCK, []
    recent = SHAPE.recent_start(before)
    for chosen, shares in zip(level.chosen, level.text.shares, strict=True):
        assert chosen.shape[1] == SHAPE.slots
        for head, of_head in enumerate(shares):
            held = {*range(SHAPE.sink), *range(recent, READ + GO_ON)}
            for chunk in chosen[head].tolist():
                held |= set(range(4 * chunk, 4 * chunk + 4))
            assert len(held) == SHAPE.sink + 4 * SHAPE.slots + READ + GO_ON - recent
            total.append(sum(float(of_head[i]) for i in held))
    assert tallies[0].mass[-1] == pytest.approx(mean(total), rel=1e-5)


def test_wishes_by_hand():
    """One query, two chunks of two keys."""
    packed, keys = torch.tensor([[[1.0, -1.0]]]), torch.tensor([[[2.0, 0.0], [0.0, 4.0], [1.0, 1.0], [3.0, 1.0]]])

    def wishes(kind):
        return chunk_wishes(packed, keys, 2, kind, 0.5)[0, 0].tolist()

    assert wishes("mean") == pytest.approx([-0.5, 0.5])
    assert wishes("bounds") == pytest.approx([1.0, 1.0])  # (2, 0) and (3, 1) are the best corners
    each = [math.log((math.exp(1) + math.exp(-2)) / 2), math.log((1 + math.exp(1)) / 2)]
    assert wishes("every") == pytest.approx(each)


def test_bounds_are_above_every_key(rig):
    kv, queries, params = rig.reading.layers[0]
    packed = ops.pack_queries(queries, kv.shape[1])
    bounds, every, means = (
        chunk_wishes(packed, kv[0], 4, kind, params.scaling) for kind in ("bounds", "every", "mean")
    )
    assert (bounds >= every - 1e-5).all()
    assert (every >= means - 1e-5).all(), "Jensen"
    largest = (packed @ kv[0].mT * params.scaling).unflatten(2, (-1, 4)).amax(3)
    assert (bounds >= largest - 1e-5).all()


def test_our_own_scores_of_means_are_those_of_production(rig):
    """The default takes a short cut to ``ops.chunk_scores``: worked out from our own wishes it is the same."""
    kv, queries, params = rig.reading.layers[0]
    default = Way("default", "", SHAPE)
    scores = chunk_scores(default, queries, kv[0], params.scaling, READ)
    packed = ops.pack_queries(queries, kv.shape[1])
    pool = SHAPE.pool(READ)
    wishes = chunk_wishes(packed, kv[0, :, pool.start * 4 : pool.stop * 4], 4, "mean", params.scaling)
    near = torch.cat([kv[0, :, :4], kv[0, :, READ - 20 :]], dim=1)
    seen = torch.cat([torch.ones(BLOCK, 8), torch.ones(BLOCK, BLOCK).tril()], dim=1) > 0
    at_near = (packed @ near.mT * params.scaling).masked_fill(~seen.repeat(3, 1), float("-inf"))
    expected = (wishes - at_near.logsumexp(2, keepdim=True)).logsumexp(1)
    torch.testing.assert_close(scores, expected)


def test_only_the_newest_queries_are_asked(rig):
    kv, queries, params = rig.reading.layers[0]
    for count in (1, 4):
        few = chunk_scores(Way("few", "", SHAPE, queries=count), queries, kv[0], params.scaling, READ, READ - 20)
        alone = chunk_scores(Way("all", "", SHAPE), queries[:, -count:], kv[0], params.scaling, READ, READ - 20)
        assert torch.equal(few, alone)
        every = chunk_scores(Way("all", "", SHAPE), queries, kv[0], params.scaling, READ, READ - 20)
        assert not torch.allclose(few, every)


def test_folds_by_hand(rig):
    """From the scores of single queries, which are their wishes less their baselines."""
    kv, queries, params = rig.reading.layers[1]
    one_head = kv[0, :1], queries[:1]  # a group of one: each query is a row

    def scores(fold, asked, near=READ - 20):
        keys = one_head[0][:, :READ]
        return chunk_scores(Way("x", "", SHAPE, fold=fold, queries=1), asked, keys, params.scaling, READ, near)

    # The newest query alone, so that its baseline is the same whoever asks beside it.
    alone = scores("sum", one_head[1])
    torch.testing.assert_close(scores("max", one_head[1]), alone)
    shares = (alone.exp() * SHAPE.chunk).sum(1) + 1  # of the baseline there is 1
    torch.testing.assert_close(scores("share", one_head[1]), alone - shares.log()[:, None])
    both = Way("x", "", SHAPE, fold="max", queries=2), Way("x", "", SHAPE, queries=2)
    keenest, added = (chunk_scores(way, one_head[1], kv[0, :1], params.scaling, READ, READ - 20) for way in both)
    assert (keenest <= added + 1e-5).all(), "one of two is less than both"
    assert (added <= keenest + math.log(2) + 1e-5).all(), "but at least half"
    assert (keenest >= alone - 1e-5).all()
    plain = chunk_scores(Way("x", "", SHAPE, fold="mean", queries=4), one_head[1], kv[0, :1], params.scaling, READ)
    average = one_head[1][:, -4:].mean(1, keepdim=True)
    pool = SHAPE.pool(READ)
    means = kv[0, :1, pool.start * 4 : pool.stop * 4].unflatten(1, (-1, 4)).mean(2)
    torch.testing.assert_close(plain, (average @ means.mT * params.scaling)[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("refresh", [True, False])
@pytest.mark.parametrize("family", ["mistral", "llama"])
def test_chooses_what_the_retrieval_cache_chooses(family, refresh):
    """After the prompt and after each of three passes, and then the two levels say the same."""
    rig = Rig(family)
    given = {"chunk": 4, "sink": 4, "recent": 20, "budget": SHAPE.budget, "bits": 16, "tile": 8, "gamma": BLOCK}
    settings = Settings(**given, refresh=refresh, gamma1=1, graphs=False)
    runtime = Runtime(rig.model, rig.layout, settings, READ + GO_ON + 1)
    way = Way("ours", "", SHAPE, when="each pass" if refresh else "once")
    try:
        Session(runtime).begin_as_read(rig.reading)
        full, chosen = runtime.caches.full, runtime.caches.retrieval
        target = TargetLevel(rig.model, runtime.caches, "each pass" if refresh else "once")
        with attached(rig.model), torch.no_grad():
            text = rig.text()
            level = ChosenLevel(way, text)
            for begin in range(READ, READ + GO_ON, BLOCK):
                block, before = chain(rig.ids[begin : begin + BLOCK]), text.asking
                assert_same_choice(level, chosen, before)
                near = full.tiled
                target.score(block)
                target.commit(range(BLOCK))
                text.step(rig.ids[begin : begin + BLOCK])
                level.choose(text.asking) if not refresh else choose_with(level, text.asking, near)
            assert_same_choice(level, chosen, text.asking)
            query = text.asking.queries[0][:, :3]
            new = text.kv[0][:, :, 50:53]
            level._begin = text.length
            ours = level.attend(0, query, new[0], new[1], text.params[0])
            theirs = chosen.attend_draft(0, query, new[0], new[1], text.params[0])
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    finally:
        runtime.close()


@pytest.mark.parametrize("bits", [4, 8])
def test_packs_as_the_retrieval_cache_does(rig, bits):
    """After the prompt: the very same rounded keys, and the same attention over rounded values."""
    given = {"chunk": 4, "sink": 4, "recent": 20, "budget": SHAPE.budget, "bits": bits, "tile": 8, "gamma": 4}
    runtime = Runtime(rig.model, rig.layout, Settings(**given, gamma1=1, graphs=False), READ + 5)
    try:
        Session(runtime).begin_as_read(rig.reading)
        chosen, text = runtime.caches.retrieval, rig.text()
        level = ChosenLevel(Way("ours", "", replace(SHAPE, bits=bits)), text)
        level._begin = READ
        for layer, kv in enumerate(text.kv):
            ours, theirs = (
                store.keys(layer, SHAPE.slots).unflatten(1, (-1, 4)) for store in (level.store, chosen.store)
            )
            for head in range(kv.shape[1]):
                order = level.chosen[layer][head].argsort(), chosen.chosen[layer][head].argsort()
                assert torch.equal(ours[head, order[0]], theirs[head, order[1]])
                whole = kv[0, head, :READ].unflatten(0, (-1, 4))[level.chosen[layer][head]]
                assert 0 < (ours[head] - whole).abs().max() < 2 ** (2 - bits)
            query, params = text.asking.queries[layer][:, :3], text.params[layer]
            arguments = (layer, query, *kv[:, :, 50:53], params)
            torch.testing.assert_close(level.attend(*arguments), chosen.attend_draft(*arguments), rtol=1e-4, atol=1e-5)
    finally:
        runtime.close()


def choose_with(level, asking, near):
    """A full cache's tail may begin before the recent window; let the baseline be the same."""
    pool = level.way.shape.pool(asking.refreshed)
    level.choose(asking)
    for layer, kv in enumerate(level.text.kv):
        keys, scaling = kv[0, :, : asking.end], level.text.params[layer].scaling
        scores = chunk_scores(level.way, asking.queries[layer], keys, scaling, asking.refreshed, near)
        level.chosen[layer] = best(scores, level.slots[layer]) + pool.start
        ops.put_chunks(level.chosen[layer], kv[:, :, : level.text.length], level.store.slots(layer))


def assert_same_choice(level, cache, asking):
    assert cache.filled == SHAPE.slots
    for ours, theirs in zip(level.chosen, cache.chosen, strict=True):
        assert torch.equal(ours.sort().values, theirs.sort().values)


def test_more_of_the_same_choice_holds_more(rig):
    """With fixed scores, a larger budget's choice contains the smaller one's. So the attention held grows."""
    ways = [Way(str(n), "", replace(SHAPE, budget=24 + 4 * n), when="once") for n in (1, 3, 9, 27)]
    levels, tallies = rig.measure(*ways)
    for smaller, larger in itertools.pairwise(levels):
        for few, many in zip(smaller.chosen, larger.chosen, strict=True):
            assert all(set(a) <= set(b) for a, b in zip(few.tolist(), many.tolist(), strict=True))
    for masses in zip(*(tally.mass for tally in tallies), strict=True):
        assert list(masses) == sorted(masses)


def test_hindsight_holds_the_most_attention(rig):
    """No other choice of as many chunks from the same ones can hold more."""
    ways = [Way("hindsight", "", SHAPE, key="every", fold="share", when="hindsight")]
    ways += [Way("default", "", SHAPE), Way("bounds", "", SHAPE, key="bounds"), Way("max", "", SHAPE, fold="max")]
    ways.append(Way("newest", "", SHAPE, when="newest"))
    _, tallies = rig.measure(*ways)
    for block in range(3):
        assert all(tally.mass[block] <= tallies[0].mass[block] + 1e-5 for tally in tallies)
    assert mean(tallies[0].mass) > mean(tallies[-1].mass)


def test_fewer_bits_change_what_is_said_but_not_what_is_held(rig):
    ways = [Way(str(bits), "", replace(SHAPE, bits=bits)) for bits in (16, 8, 4)]
    levels, tallies = rig.measure(*ways)
    assert all(torch.equal(a, b) for level in levels[1:] for a, b in zip(level.chosen, levels[0].chosen, strict=True))
    apart = [torch.tensor(t.overlap[1.0]).sub(torch.tensor(tallies[0].overlap[1.0])).abs().mean() for t in tallies]
    assert 0 == apart[0] < apart[1] < apart[2]
    assert tallies[0].mass == tallies[1].mass == tallies[2].mass


@pytest.mark.parametrize("layers", ["need", "gain"])
def test_layers_share_the_same_total(rig, layers):
    with attached(rig.model), torch.no_grad():
        text = rig.text()
        slots = layer_slots(Way("x", "", SHAPE, layers=layers), text)
        assert sum(slots) == SHAPE.slots * len(text.kv)
        assert min(slots) >= 1
        text.step(rig.ids[READ : READ + BLOCK])
        level = ChosenLevel(Way("x", "", SHAPE, layers=layers), text)
        assert [chosen.shape[1] for chosen in level.chosen] == level.slots


def test_shares_by_hand():
    assert apportion([3.0, 1.0], 8, 100) == [6, 2]
    assert apportion([9.0, 1.0, 0.0], 12, 7) == [7, 4, 1]
    assert sum(apportion([1.0, 1.0], 10, 3)) == 10, "more than there is room for"
    gains = torch.tensor([[0.5, 0.4, 0.05], [0.3, 0.2, 0.1], [0.01, 0.0, 0.0]])
    assert largest_gains(gains, 5) == [2, 2, 1]
    assert sum(largest_gains(gains, 12)) == 12


def test_equal_memory_is_that_of_the_speculation_bench():
    settings = Settings()
    for budget in (136, 187, 375, 750):
        ours = equal_memory(settings, Settings.triforce(budget=budget), 64).budget
        for way in make_ways(settings, budget, 64):
            times = next((times for times in MULTIPLES if f"memory x{times}" in way.name), 1)
            if "equal tokens" not in way.name:
                limit = RetrievalShape(times * budget, 8, 8, 64).held_bytes(64, 2)
                assert 0.9 * limit < way.shape.held_bytes(64, 2) <= limit
        assert make_ways(settings, budget, 64)[0].shape == RetrievalShape(ours, 8, 8, 64, 4)


def test_one_more_chunk_would_not_fit():
    reference = RetrievalShape(187, 8, 8, 64)
    for chunk, bits in ((4, 4), (8, 8), (16, 4), (32, 4)):
        shape = same_memory(reference, chunk, bits, 64)
        limit = reference.held_bytes(64, 2)
        assert shape.held_bytes(64, 2) <= limit < replace(shape, budget=shape.budget + chunk).held_bytes(64, 2)
    with pytest.raises(InputError, match="no room for a single chunk of 32 tokens"):
        same_memory(RetrievalShape(80, 8, 8, 64), 32, 4, 64)


def test_figures_by_hand():
    """Two tokens to choose from: p = (.8, .2) and (.5, .5) against q = (.6, .4) and (.5, .5), at a temperature of 1."""
    target = Target(torch.tensor([[0.8, 0.2], [0.5, 0.5]]).log(), torch.Generator().manual_seed(0))
    target.noise.zero_()
    target.drawn = {t: torch.zeros(DRAWS, 2, dtype=torch.long) for t in TEMPERATURES}
    tally = Tally()
    logits = torch.tensor([[0.6, 0.4, 1e-9, 1e-9], [0.3, 0.7, 1e-9, 1e-9]]).log()
    target.rows = {t: torch.nn.functional.pad(row, (0, 2)) for t, row in target.rows.items()}
    target.noise = torch.zeros(DRAWS, 2, 4)
    tally.add(target, logits, 0.5)
    assert tally.overlap[1.0] == pytest.approx([0.8, 0.8])
    assert tally.greedy[0] == 1.0
    assert tally.ranks[1.0][0][:, 0].tolist() == [1.0, 0.0]
    assert tally.ranks[1.0][0][:, 1].tolist() == [0.0, 1.0]
    hits, cases = tally.kinds
    assert cases.sum(1).tolist() == [2 * 2 * DRAWS] * 4
    assert hits[:2].sum(1).tolist() == [2 * DRAWS] * 2
    # Leads of ln 1.5 = 0.41 and ln(7 / 3) = 0.85 at 1, and those over 0.6; a first candidate's gap would be 0.
    assert cases[0].nonzero().flatten().tolist() == [1, 2, 3, 5]


def test_chain_by_hand():
    assert chain_yield([0.5, 0.5], 2) == pytest.approx(1 + 0.5 + 0.25)
    assert chain_yield([1.0, 0.0, 1.0], 2) == pytest.approx((2 + 1) / 2)
    assert chain_yield([1.0], 2) is None


def test_change_is_against_the_default(rig):
    levels, tallies = rig.measure(Way("default", "default", SHAPE), Way("once", "when", SHAPE, when="once"))
    rows = [make_row(level, tally, tallies[0], 8) for level, tally in zip(levels, tallies, strict=True)]
    assert rows[0]["change"]["1"] == {"mean": 0.0, "error": 0.0}
    difference = rows[1]["acceptance"]["1"] - rows[0]["acceptance"]["1"]
    assert rows[1]["change"]["1"]["mean"] == pytest.approx(difference)
    assert rows[0]["among_first"]["1"] == sorted(rows[0]["among_first"]["1"])


def test_sliding_windows_are_refused():
    model = tiny_model("mistral-sliding")
    layout = probe(model)
    reading = Reading.of(model, layout, prompt_ids(60)[0].tolist())
    with pytest.raises(InputError, match="2 of the model's 2 layers have a sliding window"):
        FullText(model, layout, reading, 0)


def test_asking_names_its_tokens(rig):
    with attached(rig.model), torch.no_grad():
        text = rig.text()
        assert isinstance(text.asking, Asking)
        assert (text.asking.end, text.asking.refreshed) == (READ, READ)
        text.step(rig.ids[READ : READ + BLOCK])
        assert (text.asking.end, text.asking.refreshed) == (READ + BLOCK, READ)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path: Path = save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(path)
    return path


def call(*arguments):
    return CliRunner().invoke(app, arguments)


ASKED = ("--tokens", "700", "--measure", "32", "--budget", "140")


def test_json(folder, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(retrieval, "find_source", lambda name: str(folder))
    png = tmp_path / "p.png"
    result = call(*ASKED, "--json", "--png", str(png))
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["tokens"], report["measured"], report["budget"]) == (700, 32, 140)
    assert report["machine"]["versions"]["torch"] == torch.__version__
    rows = {row["way"]: row for row in report["rows"]}
    assert len(rows) == len(report["rows"]) >= 25
    for row in rows.values():
        assert 0 < row["mass"] <= 1
        assert all(0 < share <= 1 for share in row["acceptance"].values())
        assert row["bytes"] <= rows["default"]["bytes"] * 6
    assert sum(rows["layers by gain"]["layer_slots"]) == 2 * rows["default"]["slots"]
    assert rows["memory x4, 4 bits"]["mass"] > rows["default"]["mass"]
    assert sum(map(sum, report["taken"]["cases"])) == 32 * DRAWS * 4 * len(TEMPERATURES)
    assert png.read_bytes().startswith(b"\x89PNG")


def test_table(folder, monkeypatch):
    monkeypatch.setattr(retrieval, "find_source", lambda name: str(folder))
    ways = retrieval.make_ways
    monkeypatch.setattr(retrieval, "make_ways", lambda *given: ways(*given)[:2])
    result = call("--tokens", "700", "--measure", "16", "--budget", "140")
    assert result.exit_code == 0, result.output
    assert "default" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "gpt-9"], "'gpt-9' is neither a local folder or GGUF file nor"),
        (["--measure", "100"], "ask for a multiple of it, not for 100"),
        (["--measure", "0"], "ask for a multiple of it, not for 0"),
        (["--task", "sing"], "unknown task 'sing'; known are explain"),
        (["--budget", "100"], "a budget of 100 tokens is too small"),
        (["--budget", "1501"], "take at most 1,500"),
        (["--png", "/no/such/folder/p.png"], "the folder of /no/such/folder/p.png does not exist"),
    ],
)
def test_mistakes(arguments, words, monkeypatch):
    monkeypatch.setattr(retrieval, "find_source", lambda name: pytest.fail("fetched"))
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr.replace("\n", " ")


def test_pictures_need_matplotlib_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setattr(retrieval, "find_source", lambda name: pytest.fail("fetched"))
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    result = call("--png", str(tmp_path / "p.png"))
    assert result.exit_code == 2
    assert "pictures need matplotlib" in result.stderr


def test_a_text_longer_than_the_model_takes(folder, monkeypatch):
    monkeypatch.setattr(retrieval, "find_source", lambda name: str(folder))
    result = call("--tokens", "5000", "--budget", "140")
    assert result.exit_code == 2
    assert "exceeds the model's 4,096 positions by 1,160" in result.stderr.replace("\n", " ")
    result = call("--tokens", "3840", "--budget", "140", "--task", "explain")  # the question makes it longer
    assert result.exit_code == 2
    assert "exceed the model's positions, 4,096, by" in result.stderr.replace("\n", " ")


def test_the_models_own_answer(folder, monkeypatch):
    """It is read as a text that is there: the first token is the prompt's last, nothing is left of the drawing."""
    monkeypatch.setattr(retrieval, "find_source", lambda name: str(folder))
    ways, read = retrieval.make_ways, []
    monkeypatch.setattr(retrieval, "make_ways", lambda *given: ways(*given)[:1])

    def watched(text, tokens, levels, say):
        read.append((text.length, text.asking.end, text.prompt, list(tokens)))
        return measure(text, tokens, levels, say)

    monkeypatch.setattr(retrieval, "measure", watched)
    asked = {"tokens": 700, "measured": 16, "budget": 140}
    report = retrieval.bench_retrieval("smollm2", task="explain", **asked)
    [(length, end, prompt, tokens)] = read
    assert length == end == prompt == report["tokens"] > 700
    assert len(tokens) == 16
    again = retrieval.bench_retrieval("smollm2", task="explain", **asked)
    assert again["rows"] == report["rows"]
    assert not {2} & set(tokens), "an end of the text"
