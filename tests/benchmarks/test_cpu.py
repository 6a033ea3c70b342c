"""The benchmark of the CPU's pieces of work: each is there, by each way."""

from __future__ import annotations

import os

from benchmarks.cpu import LOOPS, PIECES, PLACES, measure
from offload_triforce.kernels.cpu import CHOICE
from tests.tiny import tiny_model


def test_each_piece_is_timed_by_each_way(monkeypatch):
    monkeypatch.setenv(CHOICE, "torch")
    found = measure(tiny_model("llama", vocab_size=1000), 400, 1)
    ways = {f"{kind} of {count}, {place}, {loops}" for kind, count in PIECES for place in PLACES for loops in LOOPS}
    assert set(found) == ways | {f"prefill, {place}" for place in PLACES} | {"step of 1, transformers"}
    assert all(times["cpu_ms"] > 0 and times["wall_ms"] > 0 for times in found.values())
    assert os.environ[CHOICE] == "torch", "what was chosen stays chosen"
