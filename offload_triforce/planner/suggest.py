"""When something does not fit: the nearest things that would."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from offload_triforce.machine.cards import CARDS
from offload_triforce.machine.units import gigabytes
from offload_triforce.model.outline import ModelShape
from offload_triforce.planner.choose import LEAST_BUDGET, NOT_RESIDENT, resident_shares
from offload_triforce.planner.fit import Footprint, footprint, missing
from offload_triforce.planner.query import PlanQuery

DEVICE, HOST = "device memory", "host memory"


def suggest(asked: PlanQuery) -> list[dict[str, str]]:
    """Options that make room, each with why and with what it makes room in. Where both are short, take one of each."""
    bare = _used(asked, **NOT_RESIDENT)
    settings = asked.choose()
    gaps = {
        gap["what"] for gap in missing(footprint(asked.model, settings, asked.context, asked.draft), *_limits(asked))
    }
    found = []
    if DEVICE in gaps:
        found += [{"option": o, "why": why, "for": DEVICE} for o, why in _smaller(asked)]
        larger = [card for card in CARDS if card.memory_bytes >= bare.vram_bytes > asked.machine.memory]
        for card in sorted(larger, key=lambda card: card.gib)[:1]:
            why = f"has {gigabytes(card.memory_bytes)}"
            found.append({"option": f'--gpu "{card.name}"', "why": why, "for": DEVICE})
    if HOST in gaps:
        need = -(-bare.host_bytes // 10**9)
        found.append({"option": f"--ram {need}GB", "why": "more host memory", "for": HOST})
    if (shorter := _longest(asked)) is not None:
        why = "the longest context that fits, in steps of 1,024"
        found.append({"option": f"--context {shorter}", "why": why, "for": " and ".join(sorted(gaps))})
    return found


def _smaller(asked: PlanQuery) -> Iterator[tuple[str, str]]:
    """What takes less of the card."""
    memory = asked.machine.memory
    if "resident" in asked.fixed and asked.settings.resident:
        room = asked.choose(**NOT_RESIDENT)
        share = resident_shares(asked.model, room, asked.context, asked.machine, asked.draft)[0]
        if _used(asked, resident=share).vram_bytes <= memory:
            yield f"--resident {share:g}", "fewer tiles on the card"
    budget = asked.settings.budget_for(asked.context)
    while "budget" in asked.fixed and (budget := budget // 2) >= LEAST_BUDGET:
        if _used(asked, budget=budget).vram_bytes <= memory:
            yield f"--budget {budget}", "a smaller retrieval cache"
            break
    fitting = [model for model in asked.variants if _fits(asked, model)]
    enough = {model.quantize for model in fitting if not model.quantize_head}
    for model in fitting:
        if not model.quantize_head or model.quantize not in enough:  # a packed head only where it is needed
            there = model.weights.total - (0 if asked.settings.embeddings == "device" else model.embedding)
            yield model.packing, f"weights take {gigabytes(there)} of the card then"


def _fits(asked: PlanQuery, model: ModelShape) -> bool:
    """Whether the card has room for such a model by the settings that would be chosen for it."""
    used = footprint(model, asked.choose(model), asked.context, asked.draft)
    return used.vram_bytes <= asked.machine.memory


def _longest(asked: PlanQuery) -> int | None:
    """The longest shorter context that fits, a multiple of 1,024; None if there is none."""
    low, high = 0, -(-asked.context // 1024)  # the first fits (nothing does), the second does not
    while high - low > 1:
        middle = (low + high) // 2
        fits = not missing(_used(asked, context=middle * 1024), *_limits(asked))
        low, high = (middle, high) if fits else (low, middle)
    return low * 1024 or None


def _used(asked: PlanQuery, model: ModelShape | None = None, context: int | None = None, **changes: Any) -> Footprint:
    """What it takes with something changed. The gammas stay as they are: seeking better ones takes time."""
    kept = {"gamma": asked.settings.gamma, "gamma1": asked.settings.gamma1}
    settings = asked.choose(model, context, **kept, **changes)
    return footprint(model or asked.model, settings, context or asked.context, asked.draft)


def _limits(asked: PlanQuery) -> tuple[int, int | None]:
    return asked.machine.memory, asked.machine.host
