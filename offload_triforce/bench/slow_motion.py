"""A card in slow motion: this machine computes, and the link is slowed as much as this machine is slower than the card.

What speculation over a slow link gains depends on proportions: what a step costs against what a pass costs. So link
and computation are slowed by one common factor. The computation cannot be chosen, so the factor is what it is here:

    factor = time of a step of the retrieval level here / time that the card's memory needs for the bytes of that step
    emulated link = the card's link / factor

**Which computation.** A step of the retrieval level with one token: it reads all weights once, it is what drafting is
paid with, and of all that is computed while decoding it is what a CPU is least bad at, compared to a card. More tokens
at a time cost a card next to nothing more, and a CPU nearly in proportion. No common factor fits both. With this one
the link is too fast for all the wider steps and passes, rather than too slow: what speculation gains comes out too
small, not too large. By how much each of them misses is measured and reported: ``misses``.

**What it is not.** The card's times come from bytes over bandwidth (and FLOPs, where they take longer), with the shares
of ``Speeds``; launching kernels is left out, which a small model on a real card may well be bound by. Sizes are those
of the dtype that runs here, on both sides of the proportion. A prefill is bound by FLOPs, which have another factor:
time to first token is in no proportion to the card's. Nothing of it was measured on that card.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from offload_triforce.bench.subject import QUERIES, Subject
from offload_triforce.config import Settings
from offload_triforce.machine.hardware import Machine
from offload_triforce.model.layout import ModelLayout
from offload_triforce.model.shape import ModelShape, shape_of_loaded
from offload_triforce.planner.predict import layer_seconds, mixing_flops, resident_step
from offload_triforce.scheduler.emulated import EmulatedDevice
from offload_triforce.scheduler.simulate import Speeds

STEPS, PASSES = 15, 3  # that are timed; the median counts


@dataclass(frozen=True)
class SlowMotion:
    """A card, and how much slower than it everything is here.

    Attributes:
        card: its name. card_gbps: its link, GB/s.
        measured_s, card_s: the step that the factor comes from, here and there.
        context: tokens of the text that it was measured at.
        misses: for other pieces of work, how many times too slow they are here for that factor (below 1: too fast).
    """

    card: str
    card_gbps: float
    measured_s: float
    card_s: float
    context: int
    misses: dict[str, float]

    @property
    def factor(self) -> float:
        """How many times slower than on the card."""
        return self.measured_s / self.card_s

    @property
    def gbps(self) -> float:
        """The emulated link, GB/s in each direction."""
        return self.card_gbps / self.factor

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "card": self.card,
            "factor": self.factor,
            "card_link_gbps": self.card_gbps,
            "link_gbps": self.gbps,
            "calibrated_on": f"a step of the retrieval level with 1 token, {self.context:,} tokens of text",
            "measured_ms": 1e3 * self.measured_s,
            "card_ms": 1e3 * self.card_s,
            "misses": self.misses,
            "note": f"emulated: not measured on the {self.card}",
        }


def calibrate(model: PreTrainedModel, layout: ModelLayout, machine: Machine, context: int) -> SlowMotion:
    """Time the model's own steps and passes here, with no link in the way, over ``context`` random keys and values.

    ``machine``: the card, its link and its speeds.
    """
    settings = Settings(graphs=False)
    wide = settings.width + settings.gamma1
    subject = Subject(model, settings, torch.arange(context) % layout.vocabulary, EmulatedDevice())
    try:
        subject.fill()
        took = {("step", n): _median(subject.draft, n, STEPS) for n in (1, wide)}
        took |= {("pass", n): _median(subject.verify, n, PASSES) for n in (1, QUERIES, settings.block)}
    finally:
        subject.close()
    return compare(took, shape_of_loaded(model, layout), machine, settings, context)


def compare(
    took: dict[tuple[str, int], float], model: ModelShape, machine: Machine, settings: Settings, context: int
) -> SlowMotion:
    """The factor, from seconds that pieces of work took here: ("step" or "pass", tokens that it reads)."""
    card = {
        (kind, n): (resident_step if kind == "step" else card_pass)(model, settings, context, machine.speeds, n)
        for kind, n in took
    }
    base = ("step", 1)
    factor = took[base] / card[base]
    misses = {
        f"{kind} of {n} token{'s' if n > 1 else ''}": seconds / card[kind, n] / factor
        for (kind, n), seconds in took.items()
        if (kind, n) != base
    }
    return SlowMotion(machine.name, machine.link_gbps, took[base], card[base], context, misses)


def card_pass(model: ModelShape, settings: Settings, context: int, speeds: Speeds, tokens: int) -> float:
    """Seconds that a pass computes on a card, its tiles being there: weights and KV cache are read once.

    Keys are read again to be scored.
    """
    layout, weights, full = model.layout, model.weights, set(model.layout.full)
    seconds = speeds.seconds(weights.head, 2 * weights.head_parameters * tokens)
    seconds += len(layout.layers) * layer_seconds(model, speeds, tokens)
    for index, shape in enumerate(layout.layers):
        again = 1.5 if index in full else 1.0
        flops = again * mixing_flops(model, shape, tokens, layout.reach(index, context))
        seconds += speeds.seconds(again * layout.held_bytes(index, context), flops)
    return seconds


def _median(work: Callable[[int], float], tokens: int, times: int) -> float:
    work(tokens)  # warms up
    return statistics.median(work(tokens) for _ in range(times))
