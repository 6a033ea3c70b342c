"""When a step is captured and when not, and the way back."""

from __future__ import annotations

import contextlib
import copy
import warnings
from functools import partial

import numpy as np
import pytest
import torch

from offload_triforce import InputError, Settings, TriForce
from offload_triforce.graphs import steps as graphs
from offload_triforce.graphs.steps import StepGraphs, alike, fixed_experts, make_graphs
from offload_triforce.model.adapter import attached, run
from offload_triforce.model.layout import probe
from offload_triforce.runtime.model_drafter import static_view
from tests.graphs.replay import ReplayCapture, replaying
from tests.tiny import greedy, prompt_ids, tiny_model

SMALL = {"chunk": 4, "sink": 4, "recent": 16, "tile": 64, "draft_cache": 64, "budget": 64, "gamma": 5, "gamma1": 3}
SMALL |= {"adaptive": False, "overlap": False}
PROMPT = prompt_ids(200)


def model_of(family):
    return tiny_model(family, seed=1, calm=True)


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


# --- what is captured


class Toy:
    """``StepGraphs`` over the draft cache of a tiny model, without an engine."""

    def __init__(self, capture=None, **limits):
        self.model = model_of("llama")
        engine = TriForce(self.model, draft="self", graphs=False, **SMALL)
        self.cache, _ = engine._drafters.small()
        make_view = partial(static_view, self.cache)
        self.steps = StepGraphs(self.model, make_view, capture or ReplayCapture(), **{"most_tokens": 4, **limits})

    def attend(self, layer, query, key, value, params):
        return self.cache.attend(layer, query, key, value, params)

    @torch.no_grad()
    def step(self, tokens, keep=1):
        ids, positions = range(3, 3 + tokens), range(self.cache.length, self.cache.length + tokens)
        depths = range(self.cache.pending, self.cache.pending + tokens)
        with attached(self.model):
            logits = self.steps(ids, positions, self, keep, np.tri(tokens, dtype=bool), depths).clone()
            expected = run(self.model, ids, positions, self, keep)
        self.cache.end_step(tokens)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        return logits


def test_a_shape_is_captured_when_it_comes_again():
    toy = Toy()
    toy.step(2)
    assert not toy.steps.graphs
    toy.step(1)
    toy.step(2)
    assert list(toy.steps.graphs) == [(2, 1)]
    assert not toy.steps.graphs[2, 1].trusted
    toy.step(2)
    assert toy.steps.graphs[2, 1].trusted
    toy.step(2, keep=2)
    toy.step(2, keep=2)
    assert list(toy.steps.graphs) == [(2, 1), (2, 2)]


def test_long_steps_are_not_captured():
    toy = Toy(most_tokens=3)
    for _ in range(3):
        toy.step(3)
        toy.step(4)
    assert list(toy.steps.graphs) == [(3, 1)]


def test_the_number_of_graphs_is_bounded():
    capture = ReplayCapture()
    toy = Toy(capture, most_graphs=2)
    for tokens in (1, 2, 3, 4) * 3:
        toy.step(tokens)
    assert list(toy.steps.graphs) == [(1, 1), (2, 1)]
    assert len(capture.replays) == 2


def test_what_does_not_fit_is_refused_as_without():
    toy = Toy()
    for _ in range(4):
        toy.step(4)
    toy.cache.length = toy.cache.capacity - 3
    with pytest.raises(IndexError, match="65 tokens do not fit a buffer of 64"):
        toy.step(4)


# --- the way back


@pytest.mark.parametrize(("error", "words"), [(RuntimeError("one\ntwo"), "slower: one$"), (KeyError(), "KeyError$")])
def test_a_capture_that_fails(error, words):
    """One warning, no second attempt, the right numbers; graphs from before go on."""
    good, asked = ReplayCapture(), []

    def capture(step):
        asked.append(step)
        if len(asked) > 1:
            step()
            raise error
        return good(step)

    toy = Toy(capture)
    for _ in range(3):
        toy.step(1)
    toy.step(2)
    with pytest.warns(RuntimeWarning, match=words) as told:
        toy.step(2)
    assert len(told) == 1
    for tokens in (1, 2, 3) * 3:
        toy.step(tokens)
    assert len(asked) == 2
    assert good.replays == [4]


def test_experts_that_are_looped_over(monkeypatch):
    """Without fixed experts, the host asks which experts are needed: every engine notices before it captures."""
    model = model_of("qwen3-moe")
    model.set_experts_implementation("eager")
    captures = replaying(monkeypatch)
    monkeypatch.setattr(graphs, "fixed_experts", lambda _: contextlib.nullcontext())
    with TriForce(model, draft="none", **SMALL) as engine:
        with pytest.warns(RuntimeWarning, match="makes the host wait for the device") as told:
            result = engine.generate(PROMPT, max_new_tokens=40, do_sample=False)
        assert len(told) == 1
    assert result.token_ids == greedy(model, PROMPT, 40)
    assert not captures[0].replays


@pytest.mark.parametrize("before", ["eager", "grouped_mm", "batched_mm"])
def test_experts_are_given_back(before):
    model = model_of("qwen3-moe")
    model.set_experts_implementation(before)
    with contextlib.suppress(KeyError), fixed_experts(model):
        assert set(model.get_experts_implementation().values()) == {"batched_mm"}
        raise KeyError
    assert set(model.get_experts_implementation().values()) == {before}


def test_models_that_are_not_captured(monkeypatch):
    """Longrope's frequencies change with the length; weights that hooks bring in are not there yet."""
    replaying(monkeypatch)
    for family in ("llama-longrope", "phi3-longrope-below"):
        model = tiny_model(family)
        assert make_graphs(model, probe(model), None, 4) is None
    model = copy.deepcopy(model_of("llama"))
    layout = probe(model)
    assert make_graphs(model, layout, None, 4) is not None
    model.model.layers[1].mlp.to("meta")
    assert make_graphs(model, layout, None, 4) is None


def test_on_the_cpu_there_is_nothing_to_gain():
    model = model_of("llama")
    assert make_graphs(model, probe(model), None, 4) is None


@pytest.mark.parametrize("value", [1, "yes", None])
def test_the_setting_is_a_bool(value):
    with pytest.raises(InputError, match="graphs must be True or False"):
        Settings(graphs=value)


def test_alike():
    torch.manual_seed(0)
    logits = torch.randn(3, 1000) * 4 + 50
    ruled_out = logits.clone()
    ruled_out[:, ::7] = -torch.inf
    for expected in (logits, ruled_out):
        assert alike(expected + 1e-4, expected)
        assert not alike(expected.bfloat16().float(), expected)
        assert alike((expected + 0.1).bfloat16(), expected.bfloat16())
        assert not alike(expected.roll(1, dims=0), expected)
        assert not alike(torch.zeros_like(expected), expected)
        assert not alike(torch.full_like(expected, torch.nan), expected)
