"""A card in slow motion: this machine computes, and the link is slowed as much as this machine is slower than the card.

What speculation over a slow link gains depends on proportions: what a step costs against what a pass costs. So link
and computation are slowed by one common factor, the largest that any piece of work needs:

    factor = the largest of (time that a piece of work takes here / time that the card would need for it)
    emulated link = the card's link / factor

That is a pass over a whole tree: more tokens at a time cost a card next to nothing more, and a CPU nearly in
proportion. All other work is held up until it takes its share (``pace``), and measured again: ``proportions`` says what
each then takes, over what it should; 1 is right.

**What it is not.** The card's times come from bytes over bandwidth (and FLOPs, where they take longer), with the shares
of ``Speeds``; launching kernels is left out, which a small model on a real card may well be bound by. Sizes are those
of the dtype that runs here, on both sides of the proportion. A prefill is bound by FLOPs, which have another factor:
time to first token is in no proportion to the card's. Nothing of it was measured on that card.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from offload_triforce.bench.pace import Pace, Work, paced
from offload_triforce.bench.subject import QUERIES, Subject
from offload_triforce.config import Settings
from offload_triforce.machine.hardware import Machine
from offload_triforce.model.layout import ModelLayout
from offload_triforce.model.shape import ModelShape, shape_of_loaded
from offload_triforce.planner.predict import layer_seconds, mixing_flops, resident_step
from offload_triforce.scheduler.emulated import EmulatedDevice
from offload_triforce.scheduler.simulate import Speeds

TIMES = {"step": 9, "pass": 3}  # that work is timed; the median counts
CORRECTIONS = 2  # of the pauses


@dataclass(frozen=True)
class SlowMotion:
    """A card, and how much slower than it everything is here.

    Attributes:
        card: its name. card_gbps: its link, GB/s. context: tokens of the text that it was measured at.
        took, card_s: seconds of pieces of work, here and there.
        pauses: how long they are held up for that. proportions: what they then take here, over what they should.
    """

    card: str
    card_gbps: float
    context: int
    took: dict[Work, float]
    card_s: dict[Work, float]
    pauses: dict[Work, float]
    proportions: dict[Work, float]

    @property
    def widest(self) -> Work:
        """The piece of work that is slowest here, compared to the card: it sets the factor."""
        return max(self.took, key=lambda work: self.took[work] / self.card_s[work])

    @property
    def factor(self) -> float:
        """How many times slower than on the card."""
        return self.took[self.widest] / self.card_s[self.widest]

    @property
    def gbps(self) -> float:
        """The emulated link, GB/s in each direction."""
        return self.card_gbps / self.factor

    def over(self, works: Mapping[Work, float]) -> dict[Work, float]:
        """Seconds that pieces of work have taken here beyond what they should."""
        return {work: seconds - self.factor * self.card_s[work] for work, seconds in works.items()}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "card": self.card,
            "factor": self.factor,
            "card_link_gbps": self.card_gbps,
            "link_gbps": self.gbps,
            "calibrated_on": f"a {named(self.widest)}, {self.context:,} tokens of text",
            "measured_ms": {named(work): 1e3 * seconds for work, seconds in self.took.items()},
            "card_ms": {named(work): 1e3 * seconds for work, seconds in self.card_s.items()},
            "proportions": {named(work): ratio for work, ratio in self.proportions.items()},
            "note": f"emulated: not measured on the {self.card}",
        }


def named(work: Work) -> str:
    """In words."""
    kind, tokens = work
    return f"{kind} of {tokens} token{'s' if tokens > 1 else ''}"


def calibrate(model: PreTrainedModel, layout: ModelLayout, machine: Machine, context: int) -> SlowMotion:
    """Time the model's own steps and passes here over ``context`` random keys and values, with nothing to be copied.

    ``machine``: the card, its link and its speeds.
    """
    settings = Settings(graphs=False, resident=1.0)
    wide = settings.width + settings.gamma1
    fitted = [("step", 1), ("step", wide), ("pass", 1), ("pass", QUERIES), ("pass", settings.block)]
    between = [("step", wide // 2), ("pass", settings.block // 4)]
    shape = shape_of_loaded(model, layout)
    subject = Subject(model, settings, torch.arange(context) % layout.vocabulary, EmulatedDevice())
    try:
        subject.fill()
        slow = compare({work: _median(subject, work) for work in fitted}, shape, machine, settings, context)
        for _ in range(CORRECTIONS):  # threads that wake up after a pause are slower
            over = slow.over(_held_up(subject, slow, fitted))
            slow = replace(slow, pauses={work: max(0.0, slow.pauses[work] - over[work]) for work in fitted})
        found = _held_up(subject, slow, fitted + between)
    finally:
        subject.close()
    card = on_card(found, shape, machine, settings, context)
    return replace(slow, proportions={work: found[work] / card[work] / slow.factor for work in found})


def _held_up(subject: Subject, slow: SlowMotion, works: Sequence[Work]) -> dict[Work, float]:
    """Seconds that they take with their pauses."""
    with paced(subject.model, Pace(slow.pauses)):
        return {work: _median(subject, work) for work in works}


def compare(
    took: dict[Work, float], model: ModelShape, machine: Machine, settings: Settings, context: int
) -> SlowMotion:
    """What follows from the seconds that pieces of work took here. Proportions are yet to be measured."""
    slow = SlowMotion(
        machine.name, machine.link_gbps, context, took, on_card(took, model, machine, settings, context), {}, {}
    )
    return replace(slow, pauses={work: -over for work, over in slow.over(took).items()})


def on_card(
    works: Iterable[Work], model: ModelShape, machine: Machine, settings: Settings, context: int
) -> dict[Work, float]:
    """Seconds that pieces of work take on a card."""
    seconds = {"step": resident_step, "pass": card_pass}
    return {(kind, n): seconds[kind](model, settings, context, machine.speeds, n) for kind, n in works}


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


def _median(subject: Subject, work: Work) -> float:
    kind, tokens = work
    do = subject.draft if kind == "step" else subject.verify
    do(tokens)  # warms up
    return statistics.median(do(tokens) for _ in range(TIMES[kind]))
