"""Settings that nobody should have to know: the largest budget that fits, the gammas that pay, a filled card."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from offload_triforce.config import Settings, replace_settings
from offload_triforce.machine.hardware import Machine, this_machine
from offload_triforce.machine.memory import free_on
from offload_triforce.model.outline import ModelLayout, ModelShape
from offload_triforce.planner.fit import DEVICE_OVERHEAD, footprint, missing
from offload_triforce.planner.nodes import choose_nodes
from offload_triforce.planner.predict import (
    DRAFT_ACCEPTANCE,
    Assumed,
    first_choice,
    passes,
    path_seconds,
    round_time,
    step_seconds,
)
from offload_triforce.planner.rounds import COMPARED
from offload_triforce.planner.sizes import make_plan
from offload_triforce.scheduler.plan import TilePlan, choose_ring

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST_BUDGET, LEAST_CHUNK = 1024, 256
GAMMAS = (2, 4, 6, 8, 12, 16, 24, 32, 48)
GAMMA1S = (2, 4, 6)
# Share of the card's memory that stays empty: the allocator rounds up and leaves holes.
RESERVE = 0.02
NOT_RESIDENT = {"resident": 0.0, "prefill_resident": 0.0}
# A step takes longer than its bytes over the bandwidth: its candidates are ranked, and the host looks at them.
MARGIN = 1.25


def assume(
    settings: Settings, context: int, draft: str, retrieval: float | None = None, drafted: float | None = None
) -> Assumed:
    """The acceptance to reckon with. ``draft``: ngram, none, self, model or mtp; the rates win where they are given."""
    if retrieval is None:
        retrieval = first_choice(settings.budget_for(context), settings.rule)
    return Assumed(retrieval, DRAFT_ACCEPTANCE[draft] if drafted is None else drafted)


def choose_settings(
    model: ModelShape,
    settings: Settings,
    context: int,
    machine: Machine,
    fixed: Collection[str] = (),
    draft: ModelShape | None = None,
    draft_kind: str = "ngram",
    retrieval: float | None = None,
    drafted: float | None = None,
) -> Settings:
    """Fill in what nobody has set, for a text of ``context`` tokens. What comes out need not fit: see ``missing``.

    Args:
        model: the target. settings: as given so far. machine: what it is for; None of its memory may be taken yet.
        fixed: names of settings that stay as they are.
        draft: a draft model's shape. draft_kind: ngram, none, self, model or mtp.
        retrieval, drafted: acceptance, where it is known.
    """
    if "hidden_states" not in fixed:
        settings = replace_settings(settings, {"hidden_states": _states(model, settings, context, machine, draft)})
    given, settings = settings, _sizes(model, settings, context, machine, fixed, draft)
    if not model.layout.full:
        return settings
    rates = assume(settings, context, draft_kind, retrieval, drafted)
    if "resident" not in fixed:  # what does not cross the link makes passes cheap, and long chains less worth while
        settings = _resident(model, settings, context, machine, fixed, draft)
    settings = _gammas(model, settings, context, machine, fixed, draft, draft_kind, rates)
    again = {name: getattr(given, name) for name in ("prefill_chunk", "budget")}  # fewer draft tokens leave more room
    settings = _sizes(model, replace_settings(settings, again), context, machine, fixed, draft)
    if not {"draft_tokens", "width"} & set(fixed):
        settings = choose_nodes(model, settings, context, machine, draft)
    plan = make_plan(model.layout, settings, context)
    settings = replace_settings(settings, {"tile": plan.tile_tokens})
    if settings.ring is None and "resident" not in fixed:
        whole = replace_settings(settings, {"ring": 1})  # nothing crosses the link where every tile is resident
        if resident_shares(model, whole, context, machine, draft)[0] == 1.0:
            return _resident(model, whole, context, machine, fixed, draft)
    settings = replace_settings(settings, {"ring": _ring(model, settings, context, machine, draft, plan)})
    return _resident(model, settings, context, machine, fixed, draft)


def choose_for_loaded(
    model: PreTrainedModel, layout: ModelLayout, settings: Settings, context: int, draft_bytes: int = 0
) -> Settings:
    """What is None in ``settings``, for a model whose weights are on the card already. On a CPU nothing is changed.

    How far to draft is found out while decoding (see ``Settings.adaptive``), so the gammas stay as they are.

    Args:
        context: tokens of prompt and answer. draft_bytes: what a draft model is yet to take.
    """
    if layout.device.type != "cuda":
        return settings
    from offload_triforce.model.shape import shape_of_loaded  # imports transformers, which is there then

    shape = shape_of_loaded(model, layout)
    machine, fixed = on_loaded_card(shape, settings)
    machine = replace(machine, memory=machine.memory - draft_bytes)
    return choose_settings(shape, settings, context, machine, fixed)


def on_loaded_card(shape: ModelShape, settings: Settings) -> tuple[Machine, Collection[str]]:
    """The card that a loaded model lies on, as if it did not, and the names of the settings that are not open there."""
    device = shape.layout.device
    taken = shape.weights.total + DEVICE_OVERHEAD  # what is free is free of these
    machine = replace(this_machine(device=device.index or 0), memory=free_on(device) + taken)
    open_ones = ("budget", "resident", "prefill_resident", "hidden_states")
    given = [name for name in open_ones if getattr(settings, name) is not None]
    if settings.prefill_chunk != Settings.prefill_chunk:
        given.append("prefill_chunk")
    return machine, (*given, "gamma", "gamma1")


def resident_shares(
    model: ModelShape, settings: Settings, context: int, machine: Machine, draft: ModelShape | None = None
) -> tuple[float, float]:
    """The shares of the tiles that there is room for on the card: while decoding, and while the prompt is read.

    In thousandths, rounded down.
    """
    used = footprint(model, replace_settings(settings, NOT_RESIDENT), context, draft)
    memory, total = int(machine.memory * (1 - RESERVE)), used.plan.layers * used.plan.tiles * used.plan.tile_bytes
    left = [memory - phase for phase in (used.decoding_bytes, used.prefill_bytes)]
    decoding, prefill = (max(0.0, min(1.0, math.floor(1000 * size / total) / 1000)) for size in left)
    return decoding, prefill


def _resident(
    model: ModelShape,
    settings: Settings,
    context: int,
    machine: Machine,
    fixed: Collection[str],
    draft: ModelShape | None,
) -> Settings:
    """The settings with those shares, but for what is ``fixed``. What lies on the card early need not come up later."""
    decoding, prefill = resident_shares(model, settings, context, machine, draft)
    if "resident" in fixed:
        decoding = settings.resident or 0.0
    elif "prefill_resident" in fixed:
        decoding = max(decoding, settings.prefill_resident or 0.0)
    changes = {"resident": decoding, "prefill_resident": min(decoding, prefill)}
    return replace_settings(settings, {name: share for name, share in changes.items() if name not in fixed})


def _states(model: ModelShape, settings: Settings, context: int, machine: Machine, draft: ModelShape | None) -> str:
    """Where a prompt's hidden states wait: on the card where that leaves room for the budget, else in host memory."""
    return "device" if _fits(model, settings, context, machine, draft, hidden_states="device") else "host"


def _ring(
    model: ModelShape, settings: Settings, context: int, machine: Machine, draft: ModelShape | None, plan: TilePlan
) -> int:
    """Tiles in flight: as many as arrive during a step of the retrieval level, so that it can hide behind the link.

    ``plan``: with the ring that nobody chose. Rather that one than none that fits.
    """
    if settings.ring is not None or not settings.overlap or settings.gamma == 0:
        return plan.ring
    step = MARGIN * step_seconds(model, settings, context, machine.speeds)
    ring = choose_ring(plan.wire_bytes, step * machine.link_gbps * 1e9)
    while ring > plan.ring and not _fits(model, settings, context, machine, draft, ring=ring):
        ring //= 2
    return max(ring, plan.ring)


def _gammas(
    model: ModelShape,
    settings: Settings,
    context: int,
    machine: Machine,
    fixed: Collection[str],
    draft: ModelShape | None,
    draft_kind: str,
    rates: Assumed,
) -> Settings:
    """The settings with those draft tokens per pass and per step that take the least time per token."""
    gammas = (
        (settings.gamma,)
        if "gamma" in fixed
        else [g for g in GAMMAS if g <= (settings.draft_tokens or g)] or [settings.draft_tokens]
    )
    if gammas == (0,):
        return settings
    gamma1s = (settings.gamma1,) if "gamma1" in fixed else GAMMA1S if draft_kind != "none" else (0,)
    if draft is not None:  # see check_draft
        gamma1s = [g for g in gamma1s if settings.draft_cache >= 2 * (settings.draft_sink + g + 2)] or gamma1s[:1]
    best, least = replace_settings(settings, {"gamma": gammas[0], "gamma1": gamma1s[0]}), math.inf
    if len(gammas) * len(gamma1s) == 1:
        return best
    # How far it pays within gamma is found out while decoding: all passes lie on the curve of the largest.
    curve = passes(model, replace_settings(settings, {"gamma": max(gammas)}), context, machine)
    for gamma in gammas:
        ways = [replace_settings(settings, {"gamma": gamma, "gamma1": gamma1}) for gamma1 in gamma1s]
        tried = min(ways, key=lambda way: path_seconds(model, way, context, machine.speeds, rates, draft))
        if gamma > gammas[0] and not _fits(model, tried, context, machine, draft):
            break  # longer ones take more room still
        timing = round_time(model, tried, context, machine, rates, draft, curve, COMPARED)
        if timing.ms_per_token < 0.98 * least:  # a longer path has to pay
            best, least = tried, timing.ms_per_token
    return best


def _sizes(
    model: ModelShape,
    settings: Settings,
    context: int,
    machine: Machine,
    fixed: Collection[str],
    draft: ModelShape | None,
) -> Settings:
    """The settings with the largest step of the prefill and then the largest budget that there is room for."""
    if "prefill_chunk" not in fixed:
        chunk = _prefill_chunk(model, settings, context, machine, draft)
        settings = replace_settings(settings, {"prefill_chunk": chunk})
    if "budget" in fixed or not model.layout.full:
        return settings
    # Plain decoding asks no retrieval cache: it gets the smallest that there is.
    plain = settings.gamma == 0 and "gamma" in fixed
    budget = settings.least_budget if plain else _budget(model, settings, context, machine, draft)
    return replace_settings(settings, {"budget": budget})


def _budget(model: ModelShape, settings: Settings, context: int, machine: Machine, draft: ModelShape | None) -> int:
    """The default budget, or half of it again and again while it does not fit, down to LEAST_BUDGET."""
    budget = settings.budget_for(context)
    while budget // 2 >= LEAST_BUDGET and not _fits(model, settings, context, machine, draft, budget=budget):
        budget //= 2
    return budget


def _prefill_chunk(
    model: ModelShape, settings: Settings, context: int, machine: Machine, draft: ModelShape | None
) -> int:
    """As given, or half of it again and again while not even the smallest budget fits, down to LEAST_CHUNK."""
    chunk = settings.prefill_chunk
    least = {} if settings.budget is not None else {"budget": min(LEAST_BUDGET, settings.budget_for(context))}
    while chunk // 2 >= LEAST_CHUNK and not _fits(
        model, settings, context, machine, draft, prefill_chunk=chunk, **least
    ):
        chunk //= 2
    return chunk


def _fits(
    model: ModelShape, settings: Settings, context: int, machine: Machine, draft: ModelShape | None, **changes: Any
) -> bool:
    """Whether the card has room, some settings changed, if no tile is resident."""
    used = footprint(model, replace_settings(settings, {**changes, **NOT_RESIDENT}), context, draft)
    return not missing(used, machine.memory, None)
