"""How many draft tokens passes get: twice as many, and twice again, where what they take is less than they bring.

A pass that waits for the link reads more draft tokens in no more time. What they take is memory, which could hold
tiles that then need not cross the link, and at some number the time of the card itself.
"""

from __future__ import annotations

from offload_triforce.config import Settings, replace_settings
from offload_triforce.machine.hardware import Machine
from offload_triforce.model.outline import ModelShape
from offload_triforce.planner.fit import footprint, missing
from offload_triforce.planner.predict import predict_target
from offload_triforce.planner.sizes import make_plan

# Multiples of the default draft tokens that are tried, and what each brings over the one before, as a share of the
# tokens per pass: by `python -m benchmarks.growth`, see docs/speculation.md.
MULTIPLES, BRINGS = (2, 4), 0.06
MOST_NODES = 1024


def grown(settings: Settings, times: int) -> Settings:
    """The settings with so many times the default draft tokens, MOST_NODES at most, and steps as many times as wide.

    Narrow steps would not fill the room. What somebody has set stays, and so do chains, and trees of a fixed size.
    """
    untouched = settings.draft_tokens is None and settings.width == Settings.width
    if not (untouched and settings.topk > 1 and settings.adaptive and settings.gamma):
        return settings
    nodes = min(MOST_NODES, times * settings.most_draft_tokens)
    return replace_settings(
        settings, {"draft_tokens": max(nodes, settings.most_draft_tokens), "width": times * settings.width}
    )


def choose_nodes(
    model: ModelShape, settings: Settings, context: int, machine: Machine, draft: ModelShape | None = None
) -> Settings:
    """The settings with as many draft tokens as pay on a machine, of those that ``grown`` gives."""
    chosen = settings
    if make_plan(model.layout, settings, context) is None:  # nothing crosses the link
        return settings
    for times in MULTIPLES:
        tried = grown(settings, times)
        if tried == settings or not _pays(model, chosen, tried, context, machine, draft):
            break
        chosen = tried
    return chosen


def _pays(
    model: ModelShape, chosen: Settings, tried: Settings, context: int, machine: Machine, draft: ModelShape | None
) -> bool:
    """Whether the card has room for ``tried``, and it takes less of each pass than it brings."""
    before, used = (
        footprint(model, replace_settings(way, {"resident": 0.0, "prefill_resident": 0.0}), context, draft)
        for way in (chosen, tried)
    )
    if missing(used, machine.memory, None):
        return False
    plan = used.plan
    lost = (used.decoding_bytes - before.decoding_bytes) / (plan.layers * plan.tiles * plan.tile_bytes)
    took, takes = (
        predict_target(model, way, context, machine, way.block, way.refresh).seconds for way in (chosen, tried)
    )
    return takes / took - 1 + lost < BRINGS
