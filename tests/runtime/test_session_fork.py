"""Where texts part: what several begin with is found again, of models whose texts cannot be cut just anywhere."""

from __future__ import annotations

import pytest
import torch

from offload_triforce import TriForce
from offload_triforce.runtime import pool
from tests.runtime.desk import HOW, model_of
from tests.tiny import greedy, prompt_ids

SHARED = 150


@pytest.mark.parametrize(
    ("family", "expected"), [("llama", [0, 150, 150]), *((f, [0, 0, 150]) for f in ("gemma3", "qwen3.5"))]
)
def test_what_texts_begin_with(monkeypatch, family, expected):
    """The second shows where they part, and leaves a mark there for the third; groups are as large as they are."""
    monkeypatch.setattr(pool, "WORTH_KEEPING", 100)
    reused = []
    with TriForce(model_of(family), **HOW) as engine:
        for number in range(3):
            prompt = torch.cat([prompt_ids(SHARED), prompt_ids(30 + number, seed=number + 5)], dim=1)
            found = engine.generate(prompt, max_new_tokens=6, do_sample=False)
            assert found.token_ids == greedy(model_of(family), prompt, 6)
            reused.append(found.stats.reused_tokens)
    assert reused == expected


def test_a_short_beginning_is_not_worth_a_mark(monkeypatch):
    monkeypatch.setattr(pool, "WORTH_KEEPING", SHARED)
    with TriForce(model_of("gemma3"), **HOW) as engine:
        for number in range(3):
            prompt = torch.cat([prompt_ids(SHARED), prompt_ids(30, seed=number + 5)], dim=1)
            assert not engine.generate(prompt, max_new_tokens=2, do_sample=False).stats.reused_tokens
            assert engine._texts.session.fork == 0
