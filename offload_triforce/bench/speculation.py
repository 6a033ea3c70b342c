"""How many tokens a pass yields: our way against TriForce's own, on the same texts and with the same memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from offload_triforce.bench.tasks import Task, common_start, loops, prompts
from offload_triforce.cache.sizes import RetrievalShape, equal_slots
from offload_triforce.config import Settings, replace_settings
from offload_triforce.engine import TriForce
from offload_triforce.errors import InputError
from offload_triforce.machine.describe import describe_machine
from offload_triforce.model.fetch import check_source, find_source
from offload_triforce.planner.nodes import MULTIPLES, grown
from offload_triforce.runtime.reading import Reading
from offload_triforce.runtime.runtime import Runtime
from offload_triforce.runtime.session import Session
from offload_triforce.scheduler.emulated import EmulatedDevice
from offload_triforce.speculation.stats import DecodeStats

TEMPERATURES = (0.0, 0.6, 1.0)
# The paper's 4096 tokens of 128K.
SHARE = 32
# Shorter texts leave the yardstick no chunks to choose.
LEAST = 4096
# What a step of level 1 costs, in passes. About that of Llama-2-7B in 16 bits at 128K on an RTX 4090: its weights and
# the retrieval cache take 16 ms at 1 TB/s, its KV cache 2.7 s at 25 GB/s.
DRAFT_COST = 0.01

# What distinguishes ours from the yardstick, by the settings that do it.
LEVERS = {
    "long chains": ("gamma", "gamma1", "adaptive"),
    "trees": ("topk", "width", "draft_tokens"),
    "coupling": ("rule",),
    "refresh": ("refresh",),
    "packed chunks": ("bits",),
    "overlapped drafting": ("overlap",),
}

Say = Callable[[str], None]
Keep = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class BenchModel:
    """A model and the length of its texts."""

    name: str
    tokens: int


MODELS = {"smollm2": BenchModel("smollm2", 6000), "qwen-coder": BenchModel("qwen-coder", 24_000)}
OTHERS = 6000  # tokens of the texts of other models


def find_bench_model(name: str) -> BenchModel:
    """A model and the length of its texts: of MODELS, or any other that can be had.

    Raises:
        InputError: it cannot.
    """
    if name in MODELS:
        return MODELS[name]
    check_source(name)
    return BenchModel(name, OTHERS)


@dataclass(frozen=True)
class Plan:
    """What is run: tasks and temperatures, ``runs`` answers of ``new_tokens`` each (one where nothing is drawn).

    ``tokens``: length of the texts; None takes each model's own. ``levers``: see ``make_ways``.
    """

    tasks: Sequence[Task]
    temperatures: Sequence[float]
    new_tokens: int
    runs: int
    tokens: int | None = None
    levers: bool = False


def yardstick(tokens: int, **changes: Any) -> Settings:
    """TriForce's own setting for texts of that many tokens."""
    return Settings.triforce(**{"budget": min(4096, tokens // SHARE), "draft_cost": DRAFT_COST, **changes})


def equal_memory(settings: Settings, reference: Settings, head_dim: int) -> Settings:
    """``settings`` with a budget that takes no more memory than that of ``reference``, both with a model in 16 bits.

    What draft tokens take while they are judged is not counted: it does not grow with the text. See ``memory``.
    """
    chunk, sink, recent = settings.chunk, settings.sink, settings.recent
    slots = equal_slots(_shape(reference), chunk, sink, recent, settings.bits, head_dim)
    return replace_settings(settings, {"budget": settings.sink + settings.recent + slots * settings.chunk})


def _shape(settings: Settings) -> RetrievalShape:
    return RetrievalShape(settings.budget, settings.chunk, settings.sink, settings.recent, settings.bits)


def memory(settings: Settings, head_dim: int) -> dict[str, int]:
    """Bytes of the retrieval cache per layer and KV head, with a model in 16 bits: held, and for draft tokens."""
    drafts = settings.room * 2 * head_dim * 2
    held = _shape(settings).held_bytes(head_dim, 2)
    return {"budget": settings.budget, "held_bytes": held, "draft_token_bytes": drafts}


def make_ways(settings: Settings, reference: Settings, head_dim: int, levers: bool) -> dict[str, Settings]:
    """Settings by name: "triforce" and "ours"; with ``levers``, each lever alone ("only ...") and left out ("no ...").

    All get the memory of ``reference``.
    """
    if not levers:  # a tree of fixed size, as some levers leave it, would always fill that room
        settings = grown(settings, MULTIPLES[-1])  # costs are a card's whose passes wait for the link
    ways = {"triforce": reference, "ours": settings}
    for lever, names in LEVERS.items() if levers else ():
        for name, base, other in ((f"only {lever}", reference, settings), (f"no {lever}", settings, reference)):
            ways[name] = replace_settings(base, {setting: getattr(other, setting) for setting in names})
    return {name: equal_memory(way, reference, head_dim) for name, way in ways.items()}


def bench_speculation(
    models: Sequence[str],
    plan: Plan,
    settings: Settings,
    say: Say = lambda line: None,
    keep: Keep = lambda report: None,
) -> dict[str, Any]:
    """Run the matrix.

    Args:
        models: names, hub ids or paths. plan: what is run. settings: our way; its budget is set to equal memory.
        say: told what is going on. keep: given the report so far after each text.

    Returns:
        For JSON: ``machine``, ``cells``, and the means over those that did not fall into loops, such as ``mean_ratio``.

    Raises:
        InputError: before anything is read.
    """
    for name in models:
        tokens = plan.tokens or find_bench_model(name).tokens
        if yardstick(tokens).budget < 2 * settings.recent:
            raise InputError(f"texts of {tokens:,} tokens are too short to compare on; take at least {LEAST:,}")
    report: dict[str, Any] = {"machine": describe_machine(), "draft_cost": settings.draft_cost, "cells": []}
    for name in models:
        _run_model(find_bench_model(name), plan, settings, say, lambda: keep(report), report)
    return report


def _run_model(
    model: BenchModel, plan: Plan, settings: Settings, say: Say, keep: Callable[[], None], report: dict[str, Any]
) -> None:
    say(f"{model.name}: loading")
    engine, tokens = TriForce.load(find_source(model.name), "ngram", dtype="float32"), plan.tokens or model.tokens
    asked = prompts(engine.tokenizer, plan.tasks, tokens)
    head_dim = engine.layout.attention[0].head_dim
    ways = make_ways(settings, yardstick(tokens, draft_cost=settings.draft_cost), head_dim, plan.levers)
    report.setdefault("settings", {})[model.name] = {name: vars(way) for name, way in ways.items()}
    report.setdefault("memory", {})[model.name] = {name: memory(way, head_dim) for name, way in ways.items()}
    for kind in dict.fromkeys(task.text for task in plan.tasks):
        group = {task: ids for task, ids in asked.items() if task.text == kind}
        start = min(common_start(list(group.values())), min(map(len, group.values())) - 1)
        say(f"{model.name}: reading {start:,} tokens of Python's {kind}")
        reading = Reading.of(engine.model, engine.layout, next(iter(group.values()))[:start])
        runs = {}
        for name, way in ways.items():
            for (task, temperature), answers in _run_way(engine, way, reading, group, plan, say, name).items():
                runs.setdefault((task, temperature), {})[name] = answers
        report["cells"] += [_cell(model.name, *which, answers, settings.draft_cost) for which, answers in runs.items()]
        _summarise(report)
        keep()


def _run_way(
    engine: TriForce, way: Settings, reading: Reading, asked: dict[Task, list[int]], plan: Plan, say: Say, name: str
) -> dict[tuple[Task, float], list[Answer]]:
    """All answers about one text with one kind of settings."""
    capacity = max(map(len, asked.values())) + plan.new_tokens + 1
    device = EmulatedDevice() if engine.layout.device.type == "cpu" else None  # with lanes, whose bytes are counted
    runtime = Runtime(engine.model, engine.layout, way, capacity, device=device)
    runs = {}
    try:
        for task, ids in asked.items():
            for temperature in plan.temperatures:
                say(f"{task.name} at {temperature:g}, {name}")
                runs[task, temperature] = _answers(engine, runtime, reading, ids, temperature, plan)
    finally:
        runtime.close()
    return runs


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
    answers, session = [], Session(runtime)
    for seed in range(1, 1 + (plan.runs if temperature > 0 else 1)):
        session.begin_as_read(reading, prompt[len(reading.tokens) : -1])
        stream = engine.resume(session, prompt, seed, max_new_tokens=plan.new_tokens, temperature=temperature)
        text = "".join(stream)
        answers.append(Answer(stream.token_ids, text, stream.stats))
    return answers


def _cell(
    model: str, task: Task, temperature: float, answers: dict[str, list[Answer]], draft_cost: float
) -> dict[str, Any]:
    """One cell of the matrix: the figures of all ways, and the ratio of ours to TriForce's.

    ``same_tokens`` must be true at temperature 0; at others the two rules draw differently from one distribution.
    """
    ways = {name: _figures(given, draft_cost) for name, given in answers.items()}
    ours, reference = (ways[name]["tokens_per_pass"] for name in ("ours", "triforce"))
    return {
        "task": task.name,
        "model": model,
        "temperature": temperature,
        "tokens_per_pass": ours,
        "tokens_per_pass_triforce": reference,
        "ratio": ours / reference,
        "same_tokens": len({tuple(given[0].tokens) for given in answers.values()}) == 1,
        "looped": any(2 * way["in_loops"] >= way["answers"] for way in ways.values()),
        "ways": ways,
        "sample": answers["ours"][0].text[:400],
    }


def _figures(answers: list[Answer], draft_cost: float) -> dict[str, Any]:
    """All answers of a cell together: those that looped are left out where others did not."""
    kept = [answer for answer in answers if not loops(answer.tokens)] or answers
    stats = [answer.stats for answer in kept]
    new, passes = sum(s.new_tokens for s in stats), sum(s.passes for s in stats)
    levels = {name: [getattr(s, name) for s in stats] for name in ("draft", "retrieval")}
    judged = {name: sum(a.judged for a in counts) for name, counts in levels.items()}
    spread = [s.tokens_per_pass for s in stats]
    return {
        "answers": len(answers),
        "in_loops": sum(loops(answer.tokens) for answer in answers),
        "tokens_per_pass": new / passes,
        "spread": [min(spread), max(spread)],
        "stdev": statistics.stdev(spread) if len(spread) > 1 else None,
        "new_tokens": new,
        "passes": passes,
        "acceptance": {n: sum(a.accepted for a in c) / judged[n] if judged[n] else None for n, c in levels.items()},
        "ranks": [sum(counts) for counts in zip(*(s.ranks for s in stats), strict=True)],
        "link_bytes_per_token": sum(s.link_bytes for s in stats) / new,
        "steps_per_pass": sum(s.steps for s in stats) / passes,
        "steps_ahead_per_pass": sum(s.steps_ahead for s in stats) / passes,
        "draft_tokens_per_pass": sum(s.draft_tokens for s in stats) / passes,
        # Of the time that decoding takes, by the cost of a step that was reckoned with.
        "draft_share": 1 - passes / (passes + draft_cost * sum(s.steps - s.steps_ahead for s in stats)),
    }


def _summarise(report: dict[str, Any]) -> None:
    """The means over the cells that say something, and over all."""
    kept = [cell for cell in report["cells"] if not cell["looped"]]
    report["mean_ratio_with_loops"] = statistics.mean(cell["ratio"] for cell in report["cells"])
    if not kept:
        return
    report["mean_ratio"] = statistics.mean(cell["ratio"] for cell in kept)
    report["least_ratio"] = min(cell["ratio"] for cell in kept)
    tasks = dict.fromkeys(cell["task"] for cell in kept)
    report["mean_ratio_by_task"] = {
        task: statistics.mean(cell["ratio"] for cell in kept if cell["task"] == task) for task in tasks
    }
    report["mean_ratio_by_way"] = {
        way: statistics.mean(c["ways"][way]["tokens_per_pass"] / c["tokens_per_pass_triforce"] for c in kept)
        for way in dict.fromkeys(way for cell in kept for way in cell["ways"])
    }
