"""What a plan says in words: first whether it is the thing to do, last the command to paste."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

from offload_triforce.config import Settings
from offload_triforce.machine.units import gigabytes
from offload_triforce.model.outline import ModelShape
from offload_triforce.model.weights import note_on_unpacking
from offload_triforce.planner.acceptance_length import mean_acceptance_length
from offload_triforce.planner.fit import unpacked_bytes
from offload_triforce.planner.query import AutoDraft
from offload_triforce.planner.report import PlanReport

PROMPT = "prompt.txt"


def verdict(found: PlanReport) -> str:
    """One sentence: whether it fits and how much of what it takes, how fast it will be, and what to do."""
    if found.missing:
        return _refusal(found)
    on_card, machine = found.chosen.on_card, found.question.machine
    amount = f"{gigabytes(found.used.vram_bytes)} of {gigabytes(machine.memory)} on the card"
    if machine.host is not None:
        amount += f" and {gigabytes(found.used.host_bytes)} of {gigabytes(machine.host)} of host memory"
    head = "Fits on the card as a whole" if on_card else "Fits"
    if not is_accepted(found):
        head += (
            f", but `generate` refuses more than the model's {found.question.model.layout.max_positions:,} positions"
        )
    return f"{head}: {amount}; {_speed(found.ms_per_token)} {_what_to_do(found)}."


def _what_to_do(found: PlanReport) -> str:
    """By which way the speed is, how the other compares, and whether this runtime is the right thing."""
    told = found.prediction
    if found.way == "hierarchy":
        if found.plain.missing:
            return "through the hierarchy, where plain decoding has no room"
        if told.round.ms_per_token > told.plain_ms:
            return f"through the hierarchy, which plain decoding (--gamma 0) beats with {_digits(told.plain_ms)} ms"
        ratio = f"{told.plain_ms / told.round.ms_per_token:.1f} times as fast as plain decoding"
        right = ", which is what this runtime is for"
        if found.plain.on_card:
            right = ", but any engine that keeps its KV cache on the card serves too"
        return f"through the hierarchy, {ratio} ({_digits(told.plain_ms)} ms){right}"
    if found.hierarchy is found.plain:
        against = ""
    elif found.hierarchy.missing:
        against = ", since there is no room for a retrieval cache"
    else:
        does = "hardly speed up" if told.round.ms_per_token < told.plain_ms else "slow down"
        against = f", which drafting would {does} ({_digits(told.round.ms_per_token)} ms)"
    if not found.chosen.on_card:
        return f"by plain decoding{against}"
    others = "any engine that keeps its KV cache on the card serves as well"
    if found.pays_from is not None:
        others += f", and this one pays from about {found.pays_from:,} tokens on"
    return f"by plain decoding{against}: {others}"


def is_accepted(found: PlanReport) -> bool:
    """Whether ``generate`` would take a text of that length."""
    positions = found.question.model.layout.max_positions
    return positions is None or found.question.context <= positions


def command(found: PlanReport) -> str:
    """What to paste into a shell, with a file name to be replaced."""
    words = ["offload-triforce", "generate", "--model", found.question.source]
    draft = found.question.draft_source
    if found.question.auto is not None and not found.question.auto.head:
        draft = "ngram"  # else the head would be read all the same where nobody knows the context before
    if found.settings.gamma and draft != "auto":
        words += ["--draft", draft]
    return shlex.join([*words, "--prompt-file", PROMPT, *_options(found)])


def notes(found: PlanReport) -> list[str]:
    """What else there is to know of this model."""
    asked, said = found.question, []
    layout = asked.model.layout
    if not is_accepted(found):
        said.append(
            f"{asked.context:,} tokens are more than the model's {layout.max_positions:,} positions: `generate` "
            "refuses them until its config.json has a longer rotary scaling, such as YaRN"
        )
    if not layout.full:
        said.append("all layers have a sliding window, which stays on the card: nothing is streamed")
    for model in [asked.model] if asked.draft in (None, asked.model) else [asked.model, asked.draft]:
        if model.gguf is not None:
            said.append(note_on_unpacking(model.gguf, unpacked_bytes(model), layout.dtype, model.quantize))
        if model.packed is not None:
            said.append(_note_on_packed(model))
    if asked.auto is not None:
        said.append(_note_on_auto(asked.auto))
    if asked.model.quantize and asked.model.weights.experts:
        said.append("bitsandbytes leaves the experts in 16 bits")
    said += _phases(found)
    if found.packed_fits:
        said.append(f"with {found.packed_fits}, all of the KV cache would fit on the card")
    return said


def _note_on_auto(auto: AutoDraft) -> str:
    """Which drafter is taken where that was left open, and why."""
    head = f"the MTP head ({gigabytes(auto.size)})"
    one, other = (head, "look-up alone") if auto.head else ("look-up alone", head)
    times = (auto.with_head, auto.with_lookup) if auto.head else (auto.with_lookup, auto.with_head)
    if times[0] is None:
        return f"neither {head} nor look-up alone makes it fit"
    beaten = "does not fit" if times[1] is None else f"would take {_digits(times[1])} ms"
    return f"--draft auto takes {one}: {_digits(times[0])} ms per token, where {other} {beaten}"


def _note_on_packed(model: ModelShape) -> str:
    """What becomes of weights that are packed in the files, and their size."""
    size, dtype = gigabytes(model.weights.total), str(model.layout.dtype)[6:]
    if model.is_packed:
        return f"the weights of {model.name} are packed ({model.packed}) and stay so on the card: {size}"
    if model.packed_counts is None:
        return f"the weights of {model.name} are packed ({model.packed}); without files, they count as {dtype}: {size}"
    return (
        f"transformers writes the packed weights of {model.name} ({model.packed}) out in {dtype} on this card: {size}"
    )


def _phases(found: PlanReport) -> list[str]:
    """What becomes of the memory between the prompt and the answer."""
    plan, settings, said = found.used.plan, found.settings, []
    if plan is not None and plan.late:
        said.append(
            f"while the prompt is read, {settings.prefill_resident:.1%} of the KV cache lies on the card; "
            f"{gigabytes(plan.late_bytes)} more come up once when the prefill's memory is free: {settings.resident:.1%}"
        )
    if settings.hidden_states == "host":
        size = gigabytes(found.used.host["hidden states of the prompt"])
        said.append(f"the prompt's hidden states ({size}) wait in host memory between two layers")
    if found.missing:
        return said
    if settings.prefill_chunk < Settings.prefill_chunk:
        said.append(
            f"the prompt is read {settings.prefill_chunk} tokens at a time, not {Settings.prefill_chunk:,}: larger "
            "steps have no room"
        )
    if settings.gamma and settings.budget < (
        usual := replace(settings, budget=None).budget_for(found.question.context)
    ):
        said.append(f"a retrieval cache of {usual:,} tokens has no room: it holds {settings.budget:,}")
    return said


def as_dict(found: PlanReport) -> dict[str, Any]:
    """For JSON. Sizes in bytes; times in the unit of their name; null where it does not fit.

    ``ms_per_token`` and what follows it are of the hierarchy, ``ms_per_token_plain`` of plain decoding; ``way`` tells
    which to take, and all sizes are of that one.
    """
    asked, told, drafts, used = found.question, found.prediction, found.drafting, found.used
    table = drafts and drafts.assumed.by_rank(found.hierarchy.settings.rule)
    return {
        "fits": not found.missing,
        "verdict": verdict(found),
        "model": asked.model.name,
        "parameters": asked.model.weights.parameters,
        "quantize": asked.model.quantize,
        "quantize_head": asked.model.quantize_head,
        "context": asked.context,
        "machine": asked.machine.name,
        "vram_bytes": used.vram_bytes,
        "vram_limit": asked.machine.memory,
        "host_bytes": used.host_bytes,
        "host_limit": asked.machine.host,
        "way": found.way,
        "on_card": found.chosen.on_card,
        "pays_from": found.pays_from,
        "ms_per_token": drafts and drafts.round.ms_per_token,
        "ms_per_token_plain": told and (None if found.plain.missing else told.plain_ms),
        "prefill_s": told and told.prefill_s,
        "tokens_per_pass": drafts and drafts.round.tokens,
        "pass_s": drafts and drafts.passing.seconds,
        "pass_link_s": drafts and drafts.passing.link,
        "step_ms": drafts and 1e3 * drafts.round.step_s,
        "steps_per_pass": drafts and drafts.round.steps + drafts.round.hidden,
        "hidden_steps_per_pass": drafts and drafts.round.hidden,
        "draft_tokens_per_pass": drafts and drafts.round.picked,
        "acceptance_by_rank": drafts and list(table.ranks),
        "tokens_per_pass_undelayed": drafts and _undelayed(found),
        "wire_ratio": used.plan.wire_ratio if used.plan is not None else None,
        "missing": found.missing,
        "suggestions": found.suggestions,
        "settings": {name: value for name, value in vars(found.settings).items() if name != "link_gbps"},
        "device": used.device,
        "host": used.host,
        "loading": {"device": used.loading.device, "host": used.loading.host},
        "prefill_bytes": used.prefill_bytes,
        "decoding_bytes": used.decoding_bytes,
        "device_plain": found.plain.used.device,
        "assumptions": found.assumptions,
        "notes": notes(found),
        "options": shlex.join(_options(found)),
        "command": command(found),
    }


def _undelayed(found: PlanReport) -> float:
    """Tokens per pass if drafting took no time: of the best tree that there may be."""
    settings = found.hierarchy.settings
    table = found.drafting.assumed.by_rank(settings.rule)
    return mean_acceptance_length(table, settings.most_draft_tokens, settings.topk, settings.gamma)


def _options(found: PlanReport) -> list[str]:
    """The settings as options of ``generate``."""
    asked, settings = found.question, found.settings
    drafting = ("budget", "gamma", "gamma1") if settings.gamma else ("gamma",)
    names = (*drafting, "tile", "ring", "resident", "prefill_resident")
    given: dict[str, Any] = {"context": asked.context} | {name: getattr(settings, name) for name in names}
    if settings.prefill_resident == settings.resident:
        del given["prefill_resident"]
    given["hidden_states"] = "host" if settings.hidden_states == "host" else None
    given["embeddings"] = settings.embeddings
    given["wire"] = settings.wire if settings.wire != Settings.wire else None
    given["prefill_chunk"] = None if settings.prefill_chunk == Settings.prefill_chunk else settings.prefill_chunk
    given |= {"quantize": asked.model.quantize, "quantize_head": asked.model.quantize_head}
    dtype = str(asked.model.layout.dtype)[6:]
    given["dtype"] = dtype if dtype != "bfloat16" else None
    said = {name.replace("_", "-"): value for name, value in given.items() if value is not None}
    return [word for name, value in said.items() for word in (f"--{name}", str(value))]


def _refusal(found: PlanReport) -> str:
    machine = found.question.machine
    used = {"device memory": found.used.vram_bytes, "host memory": found.used.host_bytes}
    limits = {"device memory": machine.memory, "host memory": machine.host}
    parts = [
        f"{gigabytes(used[gap['what']])} of {gap['what']} where there are {gigabytes(limits[gap['what']])}, "
        f"{gigabytes(gap['bytes'])} too little"
        for gap in found.missing
    ]
    if len(found.missing) == 1:
        remedies = " or ".join(other["option"] for other in found.suggestions[:2])
    else:  # one of each
        remedies = " and ".join({other["for"]: other["option"] for other in reversed(found.suggestions)}.values())
    remedy = f"{remedies} would make it fit" if remedies else "take a smaller model"
    return f"Does not fit: it takes {', and '.join(parts)}; {remedy}."


def _speed(ms: float) -> str:
    return f"about {_digits(ms)} ms per token ({_digits(1e3 / ms)} tokens per second)"


def _digits(value: float) -> str:
    """A number for people, with two digits at least."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"
