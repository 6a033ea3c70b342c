"""What a step of level 1 and a pass ask of the host: how often it waits, what it launches, and what it calls.

The logits stand in for what is on a device: whoever takes a number out of them, or out of what was computed of them,
makes the host wait. The counts do not depend on the machine.
"""

from __future__ import annotations

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from offload_triforce import TriForce
from offload_triforce.kernels import ops
from offload_triforce.runtime.levels import RetrievalLevel, TargetLevel
from offload_triforce.speculation.acceptance import Coupled, Resampled
from offload_triforce.speculation.sampling import RandomChoices
from tests.graphs.replay import replaying
from tests.tiny import VOCABULARY, prompt_ids, tiny_model

SMALL = {"chunk": 4, "sink": 4, "recent": 16, "tile": 64, "draft_cache": 64, "budget": 64, "gamma": 6, "gamma1": 2}
TREE = {**SMALL, "topk": 3, "width": 3, "draft_tokens": 20, "adaptive": False, "overlap": False, "draft": "none"}
PROMPT, NEW = prompt_ids(200), 40
WAITS = {"tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero", "masked_select"}


class OnDevice(torch.Tensor):
    """Counts how often a number of it, or of anything computed of it, comes to the host."""

    waits = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.waits += getattr(func, "__name__", "") in WAITS
        return super().__torch_function__(func, types, args, kwargs or {})


class Launches(TorchDispatchMode):
    """Counts operations that are no views: on CUDA, each is a launch or more."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not any(value.alias_info is not None for value in func._schema.returns)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", seed=1, calm=True)


@pytest.fixture
def waits(monkeypatch):
    """The logits of both levels are on the device."""
    for level in (RetrievalLevel, TargetLevel):

        def score(self, *args, score=level.score):
            return score(self, *args).as_subclass(OnDevice)

        monkeypatch.setattr(level, "score", score)
    monkeypatch.setattr(OnDevice, "waits", 0)
    return OnDevice


def counted(monkeypatch, of, name):
    """How often a method is called, as a list that grows."""
    calls, method = [], getattr(of, name)
    monkeypatch.setattr(of, name, lambda *args, **kwargs: calls.append(1) or method(*args, **kwargs))
    return calls


ROWWISE = {
    "greedy": {"do_sample": False},
    "temperature": {"temperature": 0.8},
    "top-k": {"temperature": 0.8, "top_k": 5},
    "top-p": {"temperature": 0.3, "top_p": 0.8},
    "min-p": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.1},
}


@pytest.mark.parametrize("name", ROWWISE)
def test_the_host_waits_once_per_step_and_once_per_pass(model, waits, name):
    """Whatever is accepted: the target's tokens at all nodes of the tree are told at once."""
    with TriForce(model, **TREE) as engine:
        stats = engine.generate(PROMPT, max_new_tokens=NEW, **ROWWISE[name]).stats
    assert stats.steps > stats.passes > 5
    assert stats.new_tokens > 1.2 * stats.passes
    assert waits.waits == stats.steps + stats.passes


def test_plain_decoding_waits_once_per_token(model, waits):
    with TriForce(model, **SMALL | {"gamma": 0, "draft": "none"}) as engine:
        stats = engine.generate(PROMPT, max_new_tokens=NEW, temperature=0.8).stats
    assert waits.waits == stats.passes == NEW


def test_where_processors_look_at_the_text_it_waits_once_per_token_too(model, waits):
    with TriForce(model, **TREE) as engine:
        options = {"temperature": 0.8, "repetition_penalty": 1.2}
        stats = engine.generate(PROMPT, max_new_tokens=NEW, **options).stats
    assert waits.waits <= stats.steps + stats.passes + stats.new_tokens


def test_where_sorting_decides_it_waits_a_second_time(model, waits, monkeypatch):
    """Flat distributions: those rows are told of again, and the text has them sorted."""
    monkeypatch.setattr("offload_triforce.speculation.top_p.MOST", 2)
    with TriForce(model, **TREE) as engine:
        stats = engine.generate(PROMPT, max_new_tokens=NEW, temperature=2.0, top_p=0.9).stats
    assert stats.steps + stats.passes < waits.waits <= 2 * stats.steps + stats.passes + stats.new_tokens


def test_resampling_waits_for_what_it_draws(model, waits, monkeypatch):
    """Once per step, once per pass, and once for each token that is drawn; a second candidate is looked at alone."""
    draws = counted(monkeypatch, RandomChoices, "draw")
    coins = counted(monkeypatch, RandomChoices, "accept")
    with TriForce(model, **TREE | {"rule": "resampled", "topk": 1, "width": 1, "draft_tokens": 6}) as engine:
        stats = engine.generate(PROMPT, max_new_tokens=NEW, temperature=0.8).stats
    assert len(coins) > 10
    assert waits.waits == stats.steps + stats.passes + len(draws)


def test_what_a_step_launches_beside_the_model(model, monkeypatch):
    """Candidates of a step, however many its places: scores, noise, the best of them; those drawn come on top."""
    found = {}
    for rule, name in ((Coupled, "coupled"), (Resampled, "resampled")):
        numbers = []

        def candidates(self, *args, of=rule.candidates, numbers=numbers):
            with Launches() as launches:
                result = of(self, *args)
            numbers.append(launches.count)
            return result

        monkeypatch.setattr(rule, "candidates", candidates)
        for temperature in (0.0, 0.8) if rule is Coupled else (0.8,):
            with TriForce(model, **TREE | {"rule": name}) as engine:
                engine.generate(PROMPT, max_new_tokens=NEW, temperature=temperature, seed=1)
            found[name, temperature] = max(numbers[5:])
            numbers.clear()
    assert found["coupled", 0.0] <= 9
    assert found["coupled", 0.8] <= 13
    assert found["resampled", 0.8] <= 15


def test_what_a_step_calls(model, monkeypatch):
    """Functions of the algorithm, per step: what grows with the number of draft tokens is C."""
    calls = 0

    def notice(frame, event, argument):
        nonlocal calls
        calls += event == "call" and frame.f_globals.get("__name__", "").startswith("offload_triforce.speculation")

    with TriForce(model, **TREE | {"draft_cost": 0.05, "adaptive": True, "overlap": True}) as engine:
        engine.generate(PROMPT, max_new_tokens=4, do_sample=False)
        sys.setprofile(notice)
        try:
            stats = engine.generate(PROMPT, max_new_tokens=NEW, do_sample=False).stats
        finally:
            sys.setprofile(None)
    assert stats.steps > 20
    assert calls / stats.steps < 400


@pytest.mark.parametrize("overlap", [False, True])
def test_what_changes_from_step_to_step_is_read_at_once(model, monkeypatch, overlap):
    """One fetch for each step that is captured or replayed, of all that it is given: no copies behind tiles."""
    captures, fetches = replaying(monkeypatch), counted(monkeypatch, ops, "fetch")
    with TriForce(model, **TREE | {"overlap": overlap, "draft_cost": 0.05}) as engine:
        stats = engine.generate(PROMPT, max_new_tokens=NEW, do_sample=False).stats
    replayed = sum(sum(capture.replays) for capture in captures)
    assert stats.steps_ahead > 0 or not overlap
    assert replayed > 0.7 * stats.steps > 20
    assert len(fetches) == replayed + sum(len(capture.replays) for capture in captures)


def test_vocabulary_is_large_enough_to_be_cut(model):
    """Guards the tests of top-k and top-p above."""
    assert VOCABULARY > 20
