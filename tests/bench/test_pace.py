"""Steps and passes that are held up: by how much, which, and for how long."""

from __future__ import annotations

import pytest
import torch

from offload_triforce.bench import pace
from offload_triforce.bench.pace import Pace, paced
from offload_triforce.bench.subject import Subject
from offload_triforce.config import Settings
from offload_triforce.scheduler.emulated import EmulatedDevice
from tests.tiny import tiny_model

PAUSES = {("step", 1): 3.0, ("step", 12): 0.0, ("pass", 1): 8.0, ("pass", 13): 6.0, ("pass", 193): 1.0}


@pytest.mark.parametrize(
    ("kind", "tokens", "seconds"), [("step", 1, 3.0), ("step", 4, 3 * 8 / 11), ("step", 20, 0.0), ("pass", 7, 7.0)]
)
def test_between_what_is_known_it_is_a_straight_line(kind, tokens, seconds):
    assert Pace(PAUSES).pause(kind, tokens) == pytest.approx(seconds)


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "qwen3.5"])
def test_each_piece_of_work_gets_its_own_and_a_prefill_none(monkeypatch, family):
    slept = []
    monkeypatch.setattr(pace.time, "sleep", slept.append)
    model = tiny_model(family)
    subject = Subject(model, Settings(graphs=False, budget=104, tile=64), torch.arange(120) % 60, EmulatedDevice())
    try:
        with paced(model, Pace(PAUSES)):
            subject.read()
            assert slept == []
            for work, tokens, seconds in ((subject.draft, 1, 3.0), (subject.verify, 13, 6.0), (subject.verify, 7, 7.0)):
                slept.clear()
                work(tokens)
                assert len(slept) == model.config.num_hidden_layers
                assert sum(slept) == pytest.approx(seconds)
        slept.clear()
        subject.verify(1)
        assert slept == []
        with paced(model, None):
            subject.verify(1)
        assert slept == []
    finally:
        subject.close()
