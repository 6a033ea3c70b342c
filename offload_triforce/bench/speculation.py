"""How many tokens a pass yields: our way against TriForce's own, on the same texts and with the same memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from offload_triforce.bench.machine import describe_machine
from offload_triforce.bench.reading import Reading
from offload_triforce.bench.tasks import Task, common_start, loops, prompts
from offload_triforce.cache.chunks import slot_bytes
from offload_triforce.config import Settings, replace_settings
from offload_triforce.engine import TriForce
from offload_triforce.errors import InputError
from offload_triforce.fetch import fetch_model
from offload_triforce.runtime import Runtime
from offload_triforce.stats import DecodeStats

TEMPERATURES = (0.0, 0.6, 1.0)
# The paper's 4096 tokens of 128K.
SHARE = 32
# What a step of level 1 costs, in passes. About that of Llama-2-7B in 16 bits at 128K on an RTX 4090: its weights and
# the retrieval cache take 16 ms at 1 TB/s, its KV cache 2.7 s at 25 GB/s.
DRAFT_COST = 0.01

Say = Callable[[str], None]


@dataclass(frozen=True)
class BenchModel:
    """A model and the length of its texts."""

    name: str
    tokens: int


MODELS = {"smollm2": BenchModel("smollm2", 6000), "qwen-coder": BenchModel("qwen-coder", 24_000)}


@dataclass(frozen=True)
class Plan:
    """What is run: tasks and temperatures, ``runs`` answers of ``new_tokens`` each (one where nothing is drawn)."""

    tasks: Sequence[Task]
    temperatures: Sequence[float]
    new_tokens: int
    runs: int


def yardstick(tokens: int, **changes: Any) -> Settings:
    """TriForce's own setting for texts of that many tokens."""
    return Settings.triforce(**{"budget": min(4096, tokens // SHARE), "draft_cost": DRAFT_COST, **changes})


def equal_memory(settings: Settings, reference: Settings, head_dim: int) -> Settings:
    """``settings`` with a budget that takes no more memory than that of ``reference``, both with a model in 16 bits."""

    def chosen(s: Settings, budget: int) -> int:
        return (budget - s.sink - s.recent) // s.chunk

    slots = chosen(reference, reference.budget)
    room = slots * slot_bytes(reference.chunk, head_dim, reference.bits, 2)
    slots = room // slot_bytes(settings.chunk, head_dim, settings.bits, 2)
    return replace_settings(settings, {"budget": settings.sink + settings.recent + slots * settings.chunk})


def bench_speculation(
    models: Sequence[str],
    plan: Plan,
    settings: Settings,
    tokens: int | None = None,
    say: Say = lambda line: None,
    keep: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Run the matrix.

    Args:
        models: of MODELS. plan: what is run. settings: our way; its budget is set to equal memory.
        tokens: length of the texts; None takes each model's own.
        say: told what is going on. keep: given the report so far after each cell.

    Returns:
        For JSON: ``machine``, ``cells`` and ``mean_ratio`` over those that did not fall into loops.
    """
    report: dict[str, Any] = {"machine": describe_machine(), "draft_cost": settings.draft_cost, "cells": []}
    for name in models:
        if name not in MODELS:
            raise InputError(f"unknown model {name!r}; known are {', '.join(MODELS)}")
        _run_model(MODELS[name], plan, settings, tokens, say, keep, report)
    return report


def _run_model(
    model: BenchModel,
    plan: Plan,
    settings: Settings,
    tokens: int | None,
    say: Say,
    keep: Callable[[dict[str, Any]], None],
    report: dict[str, Any],
) -> None:
    say(f"{model.name}: loading")
    engine = TriForce.load(fetch_model(model.name), dtype="float32")
    asked = prompts(engine.tokenizer, plan.tasks, tokens or model.tokens)
    reference = yardstick(tokens or model.tokens, draft_cost=settings.draft_cost)
    ours = equal_memory(settings, reference, engine.layout.layers[0].head_dim)
    ways = {"triforce": reference, "ours": ours}
    report.setdefault("settings", {})[model.name] = {way: vars(chosen) for way, chosen in ways.items()}
    for kind in dict.fromkeys(task.text for task in plan.tasks):
        group = {task: ids for task, ids in asked.items() if task.text == kind}
        start = min(common_start(list(group.values())), min(map(len, group.values())) - 1)
        say(f"{model.name}: reading {start:,} tokens of Python's {kind}")
        reading = Reading.of(engine.model, engine.layout, next(iter(group.values()))[:start])
        context = max(map(len, group.values())) + plan.new_tokens + 1
        runs = {}
        for way, chosen in ways.items():
            runtime = Runtime(engine.model, engine.layout, chosen, context)
            try:
                for task, ids in group.items():
                    for temperature in plan.temperatures:
                        say(f"{model.name}: {task.name} at {temperature:g}, {way}")
                        runs[way, task, temperature] = _answers(engine, runtime, reading, ids, temperature, plan)
            finally:
                runtime.close()
        for task in group:
            for temperature in plan.temperatures:
                both = {way: runs[way, task, temperature] for way in ways}
                report["cells"].append(_cell(model.name, task, temperature, both))
        _summarise(report)
        keep(report)


@dataclass(frozen=True)
class Answer:
    """One answer: its tokens, and what was counted."""

    tokens: list[int]
    text: str
    stats: DecodeStats


def _answers(
    engine: TriForce, runtime: Runtime, reading: Reading, prompt: list[int], temperature: float, plan: Plan
) -> list[Answer]:
    """Answers to one prompt; seeds count from 1."""
    answers = []
    for seed in range(1, 1 + (plan.runs if temperature > 0 else 1)):
        reading.fill(runtime, prompt[len(reading.tokens) : -1])
        stream = engine.resume(runtime, prompt, seed, max_new_tokens=plan.new_tokens, temperature=temperature)
        text = "".join(stream)
        answers.append(Answer(stream.token_ids, text, stream.stats))
    return answers


def _cell(model: str, task: Task, temperature: float, both: dict[str, list[Answer]]) -> dict[str, Any]:
    """One cell of the matrix: both ways' figures, and their ratio."""
    cell: dict[str, Any] = {"task": task.name, "model": model, "temperature": temperature}
    looped = {way: sum(loops(answer.tokens) for answer in answers) for way, answers in both.items()}
    rates = {way: _figures(answers) for way, answers in both.items()}
    cell["tokens_per_pass"] = rates["ours"]["tokens_per_pass"]
    cell["tokens_per_pass_triforce"] = rates["triforce"]["tokens_per_pass"]
    cell["ratio"] = cell["tokens_per_pass"] / cell["tokens_per_pass_triforce"]
    cell["looped"] = any(2 * looped[way] >= len(answers) for way, answers in both.items())
    return cell | {"answers_in_loops": looped, **rates, "sample": both["ours"][0].text[:400]}


def _figures(answers: list[Answer]) -> dict[str, Any]:
    """All answers of a cell together: those that looped are left out where others did not."""
    kept = [answer for answer in answers if not loops(answer.tokens)] or answers
    stats = [answer.stats for answer in kept]
    new, passes = sum(s.new_tokens for s in stats), sum(s.passes for s in stats)
    levels = {name: [getattr(s, name) for s in stats] for name in ("draft", "retrieval")}
    judged = {name: sum(a.judged for a in counts) for name, counts in levels.items()}
    spread = [s.tokens_per_pass for s in stats]
    return {
        "tokens_per_pass": new / passes,
        "spread": [min(spread), max(spread)],
        "stdev": statistics.stdev(spread) if len(spread) > 1 else None,
        "new_tokens": new,
        "passes": passes,
        "acceptance": {n: sum(a.accepted for a in c) / judged[n] if judged[n] else None for n, c in levels.items()},
        "link_bytes_per_token": sum(s.link_bytes for s in stats) / new,
        "steps_per_pass": sum(s.steps for s in stats) / passes,
        "steps_ahead_per_pass": sum(s.steps_ahead for s in stats) / passes,
        "guesses_per_pass": sum(s.nodes for s in stats) / passes,
        "draft_share": sum(s.draft_s - s.ahead_s for s in stats) / sum(s.decode_s for s in stats),
    }


def _summarise(report: dict[str, Any]) -> None:
    """The means over the cells that say something."""
    kept = [cell for cell in report["cells"] if not cell["looped"]]
    if kept:
        report["mean_ratio"] = statistics.mean(cell["ratio"] for cell in kept)
        report["least_ratio"] = min(cell["ratio"] for cell in kept)
        names = dict.fromkeys(cell["task"] for cell in kept)
        report["ratio_by_task"] = {
            name: statistics.mean(cell["ratio"] for cell in kept if cell["task"] == name) for name in names
        }
