"""A text that is cut, read on from and parked is bit for bit the same, whatever the threads do meanwhile."""

from __future__ import annotations

import pytest
import torch

from offload_triforce.config import Settings, replace_settings
from offload_triforce.model.adapter import attached
from offload_triforce.model.layout import probe
from offload_triforce.planner import sizes
from offload_triforce.runtime.held import HeldText
from offload_triforce.runtime.levels import TargetLevel
from offload_triforce.runtime.prefix import Start
from offload_triforce.runtime.runtime import Runtime
from offload_triforce.runtime.session import Session
from offload_triforce.scheduler.store import Leaving
from offload_triforce.speculation.tree import chain
from tests.runtime import test_pipeline_exact as pipeline
from tests.scheduler.devices import EagerDevice, LateDevice, chaotic
from tests.tiny import prompt_ids, tiny_model

SETTINGS = replace_settings(pipeline.SETTINGS, {"ring": 2})
TEXT = prompt_ids(140)[0]


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch):
    monkeypatch.setattr(sizes, "GROUP", 30)
    monkeypatch.setattr(sizes, "MARKED_GROUP", 30)


def history(model, layout, device, **changes):
    """Logits and keys and values along the way of a session that is cut, gone on with, and parked in between."""
    runtime = Runtime(model, layout, Settings(**{**vars(SETTINGS), **changes}), 160, device=device)
    seen = []

    def look():
        if runtime.caches.full is not None:
            runtime.caches.still()
            seen.extend(runtime.caches.full.copy_out(i, 0, len(session.ids)) for i in range(len(layout.full)))

    def passes(ids):
        target = TargetLevel(model, runtime.caches, "each pass")
        for start in range(0, len(ids), 4):
            seen.append(target.score(chain(ids[start : start + 4].tolist())).clone())
            target.commit(range(len(ids[start : start + 4])))

    try:
        with attached(model), torch.no_grad():
            session = Session(runtime, keep=True)
            session.begin(TEXT[:70])
            passes(TEXT[70:90])
            session._ids = TEXT
            session.prepare(TEXT[:121])  # reads on
            look()
            parked = HeldText.copy(session.source())
            other = torch.cat([TEXT[:50], TEXT[20:70], TEXT[:10]])
            session.prepare(other)  # cuts
            look()
            points = parked.checkpoints
            session.take(parked, Start(len(parked.tokens), points[-1] if points else None))
            look()
            session.prepare(TEXT)
            passes(TEXT[-1:])
            look()
    finally:
        runtime.close()
    return seen


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.fixture(scope="module", params=["llama", "gemma3", "qwen3.5"])
def family(request):
    model = tiny_model(request.param)
    return model, probe(model)


@pytest.mark.parametrize(
    "changes", [{}, {"resident": 0.7, "prefill_resident": 0.2}, {"hidden_states": "host"}], ids=str
)
def test_bit_identical_under_adversarial_delays(family, changes):
    expected = history(*family, EagerDevice(), **changes)
    assert_same(history(*family, LateDevice(), **changes), expected)
    for seed in range(4):
        assert_same(history(*family, chaotic(seed, longest_ms=0.3), **changes), expected)


@pytest.mark.parametrize("mutation", ["source", "arrival"])
def test_a_missing_wait_shows(monkeypatch, mutation):
    model = tiny_model("llama")
    layout = probe(model)
    expected = history(model, layout, EagerDevice())
    if mutation == "source":
        monkeypatch.setattr(Leaving, "wait", lambda self, end=None: None)
    if mutation == "arrival":
        monkeypatch.setattr(LateDevice, "await_landing", lambda self, landed: lambda: 0.0)
    try:
        actual = history(model, layout, LateDevice())
    except (RuntimeError, IndexError):
        return
    assert not all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
