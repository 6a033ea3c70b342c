"""Levels 0 and 1 as captured steps, through the whole engine: the same draft tokens as without."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch

from offload_triforce import Settings, TriForce
from offload_triforce.graphs import steps as graphs
from offload_triforce.graphs.steps import StepGraphs
from offload_triforce.model.adapter import run
from tests.graphs.replay import replaying
from tests.tiny import disturbed, greedy, prompt_ids, tiny_model

SMALL = {"chunk": 4, "sink": 4, "recent": 16, "tile": 64, "draft_cache": 64, "budget": 64, "gamma": 5, "gamma1": 3}
SMALL |= {"adaptive": False, "overlap": False}  # by the clock, no two runs would make the same draft tokens
SETTINGS = Settings(**SMALL)
EAGER = Settings(**SMALL, graphs=False)
PROMPT, NEW = prompt_ids(200), 64
FAMILIES = ("llama", "qwen2-sliding", "gemma3", "mistral-sliding", "qwen3-moe", "qwen3.5")


def model_of(family):
    return tiny_model(family, seed=1 if family in ("llama", "qwen3-moe", "gemma3") else 0, calm=True)


def graphs_of(engine):
    """Those of both levels."""
    small = engine._drafters._small
    return [engine.runtime.graphs, small[1]] if small else [engine.runtime.graphs]


def answer(engine, prompt=PROMPT, new=NEW):
    return engine.generate(prompt, max_new_tokens=new, do_sample=False)


@pytest.fixture
def captures(monkeypatch):
    """Engines on the CPU capture their steps too."""
    return replaying(monkeypatch)


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


# --- the same as without


@pytest.mark.parametrize(("family", "draft"), [*((family, "self") for family in FAMILIES), ("gemma3", "model")])
def test_nothing_changes(family, draft, captures):
    """Token for token, also of what is drafted: what the lower levels say wrong, the target would put right."""
    model = model_of(family)
    small = disturbed(model, 0.03) if draft == "model" else draft
    with TriForce(model, draft=small, settings=EAGER) as engine:
        plain = answer(engine)
        assert graphs_of(engine) == [None, None]
    assert not captures
    with TriForce(model, draft=small, settings=SETTINGS) as engine:
        result = answer(engine)
        shapes = [set(level.graphs) for level in graphs_of(engine)]
    assert result.token_ids == plain.token_ids == greedy(model, PROMPT, NEW)
    assert result.stats.draft == plain.stats.draft
    assert result.stats.retrieval == plain.stats.retrieval
    assert shapes[0] <= {(n, n) for n in range(1, 12)}
    assert max(tokens for tokens, _ in shapes[0]) > 4
    assert (1, 1) in shapes[1]
    assert max(tokens for tokens, _ in shapes[1]) <= 4
    replays = [sum(capture.replays) for capture in captures]
    assert replays[1] > 0.8 * result.stats.draft.proposed
    assert replays[0] > 0.7 * result.stats.steps


@pytest.mark.parametrize("family", ["llama", "qwen2-sliding", "gemma3", "qwen3.5"])
def test_logits_and_keys_equal(family, captures, monkeypatch):
    compare_each_step(monkeypatch)
    with TriForce(model_of(family), draft="self", settings=SETTINGS) as engine:
        answer(engine, new=40)


def compare_each_step(monkeypatch):
    """After each step by graph, take it again without, over what was held before: logits, keys and values."""
    step = StepGraphs.__call__

    def compared(self, tokens, positions, view, keep, seen, depths):
        if (len(tokens), keep) not in self.graphs:
            return step(self, tokens, positions, view, keep, seen, depths)
        buffers = self._make_view(len(tokens)).buffers
        before = [buffer.kv.clone() for buffer in buffers]
        logits = step(self, tokens, positions, view, keep, seen, depths).clone()
        after = [buffer.kv.clone() for buffer in buffers]
        for buffer, kv in zip(buffers, before, strict=True):
            buffer.kv.copy_(kv)
        torch.testing.assert_close(logits, run(self.model, tokens, positions, view, keep), atol=1e-4, rtol=1e-4)
        for buffer, kv in zip(buffers, after, strict=True):
            torch.testing.assert_close(buffer.kv, kv, atol=1e-5, rtol=1e-5)
        return logits

    monkeypatch.setattr(StepGraphs, "__call__", compared)


def baked(monkeypatch, what):
    """Mistakes that a capture forgives: numbers of the host that belong to one step."""
    load = graphs.StepGraph.load

    def stuck(self, inputs):
        load(self, inputs)
        if not hasattr(self, "first"):
            self.first = self._inputs.clone()
        names = ("ids", "positions", "depths", "held", "mask")
        parts = dict(zip(names, self._inputs.split(self._sizes), strict=True))
        first = dict(zip(names, self.first.split(self._sizes), strict=True))
        parts[what].copy_(first[what])

    monkeypatch.setattr(graphs.StepGraph, "load", stuck)


@pytest.mark.parametrize("what", ["ids", "positions", "held", "mask"])
def test_a_number_of_the_host_would_be_noticed(what, captures, monkeypatch):
    """Else the tests above would say nothing."""
    monkeypatch.setattr(graphs, "alike", lambda *_: True)
    compare_each_step(monkeypatch)
    baked(monkeypatch, what)
    with TriForce(model_of("llama"), draft="self", settings=SETTINGS) as engine, pytest.raises(AssertionError):
        answer(engine)


@pytest.mark.parametrize("what", ["ids", "positions", "held"])
def test_a_wrong_graph_is_given_up_at_its_first_replay(what, captures, monkeypatch):
    baked(monkeypatch, what)
    model = tiny_model("gemma3", seed=1)
    with TriForce(model, draft="none", settings=SETTINGS) as engine:
        with pytest.warns(RuntimeWarning, match="Gemma3ForCausalLM is run without.*computed something else"):
            result = answer(engine, new=60)
        assert not graphs_of(engine)[0].graphs
    assert result.token_ids == greedy(model, PROMPT, 60)
    assert [sum(capture.replays) for capture in captures] == [1]


def test_texts_after_one_another_share_the_graphs(captures):
    model = model_of("gemma3")
    with TriForce(model, draft="self", settings=SETTINGS, context=500) as engine:
        first = answer(engine, new=60)
        known = [dict(level.graphs) for level in graphs_of(engine)]
        counts = [sum(capture.replays) for capture in captures]
        for tokens in (41, 330):
            prompt = prompt_ids(tokens)
            assert answer(engine, prompt, 60).token_ids == greedy(model, prompt, 60)
        assert answer(engine, new=60).stats.draft == first.stats.draft
        for level, before in zip(graphs_of(engine), known, strict=True):
            assert before.items() <= level.graphs.items()
    assert len(captures) == 2
    assert all(sum(capture.replays) > count for capture, count in zip(captures, counts, strict=True))


def test_an_answer_that_was_given_up_leaves_the_draft_alone(captures):
    """The draft's cache outlives an answer: one that comes too late must not touch it."""
    with TriForce(model_of("llama"), draft="self", settings=SETTINGS, context=500) as engine:
        plain = answer(engine, new=60)
        late = engine.stream(PROMPT, max_new_tokens=60, do_sample=False)
        stream = engine.stream(PROMPT, max_new_tokens=60, do_sample=False)
        first = next(stream._tokens)
        with pytest.raises(ValueError, match="given up"):
            next(late._tokens)
        for _ in stream:
            pass
        assert first + stream.token_ids == plain.token_ids
        assert stream.stats.draft == plain.stats.draft


def test_in_inference_mode(captures):
    model = model_of("llama")
    with torch.inference_mode(), TriForce(model, draft="self", settings=SETTINGS) as engine:
        result = answer(engine, new=40)
        assert all(level.graphs for level in graphs_of(engine))
    assert result.token_ids == greedy(model, PROMPT, 40)


def test_closing_gives_the_memory_back(captures):
    """At once, not when cycles are collected."""
    with TriForce(model_of("llama"), draft="self", settings=SETTINGS) as engine:
        answer(engine, new=60)
        alive = [weakref.ref(graph._inputs) for level in graphs_of(engine) for graph in level.graphs.values()]
        alive.append(weakref.ref(engine._drafters._small[0].kv))
        captures.clear()
        gc.disable()
        try:
            engine.close()
            assert [ref() for ref in alive] == [None] * len(alive)
        finally:
            gc.enable()


# --- CUDA


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_graphs(family, monkeypatch):
    """The real ones, against steps without; also for the time when the host's memory is pinned elsewhere."""
    model = model_of(family).cuda()
    expected = greedy(model, PROMPT.cuda(), NEW)
    with TriForce(model, draft="self", settings=EAGER) as engine:
        plain = answer(engine)
    with TriForce(model, draft="self", settings=SETTINGS) as engine:
        result = answer(engine)
        for level in graphs_of(engine):
            assert sum(graph.trusted for graph in level.graphs.values()) > 0
        compare_each_step(monkeypatch)
        answer(engine, new=100)
    assert result.token_ids == plain.token_ids == expected
    for counted, count in ((result.stats.draft, plain.stats.draft), (result.stats.retrieval, plain.stats.retrieval)):
        assert abs(counted.accepted - count.accepted) <= 0.1 * count.judged
