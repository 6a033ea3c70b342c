"""What the hybrid's draft tokens save: the same texts and seeds, level by level, with its MTP head and without.

Settings are those of ``bench speculation``: TriForce's own, and ours with a retrieval cache of the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, Qwen3_5ForCausalLM

from benchmarks.hybrid_model import TRAINING, held_out_text
from offload_triforce import Settings, TriForce
from offload_triforce.bench.speculation import DRAFT_COST, equal_memory, memory, yardstick
from offload_triforce.bench.tasks import loops
from offload_triforce.machine.describe import describe_machine
from offload_triforce.speculation.stats import Acceptance, DecodeStats

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """Texts of so many tokens, answers of ``new_tokens``; ``runs`` of them to each text where something is drawn."""

    tokens: int = 4096
    new_tokens: int = 96
    texts: int = 3
    runs: int = 2
    temperatures: Sequence[float] = (0.0, 0.6, 1.0)


DEFAULT = Plan()
# Who drafts for level 1, by what a way's name ends with.
DRAFTS = {"look-up": "ngram", "MTP": "mtp", "MTP and look-up": "mtp+ngram"}


def is_trained(folder: Path) -> bool:
    """Whether a model is kept there, whole: what the training took is written last."""
    return (folder / TRAINING).is_file()


def bench_hybrid(folder: Path, plan: Plan, say: Say, **changes: Any) -> dict[str, Any]:
    """Decode with all ways.

    Args:
        folder: the trained model's. plan: what is run. say: told what is going on.
        changes: to our settings.

    Returns:
        For JSON: ``machine``, ``training``, ``plan``, ``memory`` and ``cells``, one for each temperature and way.

    Raises:
        InputError, UnsupportedModelError: the head cannot be read.
    """
    model = Qwen3_5ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = _prompts(tokenizer(held_out_text()).input_ids, plan)
    head_dim = model.config.head_dim
    reference = yardstick(plan.tokens)
    ours = equal_memory(Settings.from_mapping({"draft_cost": DRAFT_COST, **changes}), reference, head_dim)
    ways = {"triforce": reference, "ours": ours}
    report = {
        "machine": describe_machine(),
        "training": json.loads((folder / TRAINING).read_text()),
        "plan": {**asdict(plan), "temperatures": list(plan.temperatures)},
        "memory": {name: memory(way, head_dim) for name, way in ways.items()},
        "cells": [],
    }
    for temperature in plan.temperatures:
        said: dict[str, list[list[int]]] = {}
        for base, way in ways.items():
            for ending, draft in DRAFTS.items():
                name = f"{base}, {ending}"
                say(f"{name} at {temperature:g}")
                answers = _answers(model, way, draft, prompts, temperature, plan)
                said[name] = [tokens for tokens, _ in answers]
                report["cells"].append(_cell(name, temperature, answers))
        _note_agreement(report["cells"], said, temperature)
    return report


def _prompts(tokens: list[int], plan: Plan) -> list[list[int]]:
    """Texts from all over what was not trained on, which go on where they are cut."""
    room = len(tokens) - plan.tokens
    starts = [room * number // max(1, plan.texts - 1) for number in range(plan.texts)]
    return [tokens[start : start + plan.tokens] for start in starts]


def _answers(
    model: PreTrainedModel, way: Settings, draft: str, prompts: list[list[int]], temperature: float, plan: Plan
) -> list[tuple[list[int], DecodeStats]]:
    answers, limit = [], {"max_new_tokens": plan.new_tokens, "eos_token_id": None}
    with TriForce(model, draft=draft, settings=way) as engine:
        for prompt in prompts:
            for seed in range(1, 1 + (plan.runs if temperature else 1)):
                result = engine.generate(torch.tensor(prompt), temperature=temperature, seed=seed, **limit)
                answers.append((result.token_ids, result.stats))
    return answers


def _cell(name: str, temperature: float, answers: list[tuple[list[int], DecodeStats]]) -> dict[str, Any]:
    stats = [one for _, one in answers]
    passes = sum(one.passes for one in stats)
    drafters = dict.fromkeys(drafter for one in stats for drafter in one.by_drafter)
    return {
        "way": name,
        "temperature": temperature,
        "answers": len(answers),
        "in_loops": sum(loops(tokens) for tokens, _ in answers),
        "passes": passes,
        "tokens_per_pass": sum(one.new_tokens for one in stats) / passes,
        "steps_per_pass": sum(one.steps for one in stats) / passes,
        "steps_ahead_per_pass": sum(one.steps_ahead for one in stats) / passes,
        "retrieval": _rate([one.retrieval for one in stats]),
        "draft": _rate([one.draft for one in stats]),
        "by_drafter": {d: _rate([one.by_drafter.get(d, Acceptance()) for one in stats]) or 0.0 for d in drafters},
    }


def _rate(counts: list[Acceptance]) -> float | None:
    judged = sum(one.judged for one in counts)
    return sum(one.accepted for one in counts) / judged if judged else None


def _note_agreement(cells: list[dict[str, Any]], said: dict[str, list[list[int]]], temperature: float) -> None:
    """Whether all drafts of one setting led to the same tokens. By resampling they need not, where tokens are drawn."""
    for cell in cells:
        if cell["temperature"] == temperature:
            base = cell["way"].partition(",")[0]
            cell["same_tokens"] = said[cell["way"]] == said[f"{base}, look-up"]
