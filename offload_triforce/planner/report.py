"""The planner's answer: what lies where and how long it takes, or what is missing and what would fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from offload_triforce.config import Settings, replace_settings
from offload_triforce.planner.choose import assume
from offload_triforce.planner.fit import Footprint, footprint, missing
from offload_triforce.planner.predict import Prediction, predict
from offload_triforce.planner.query import PlanQuery
from offload_triforce.planner.suggest import suggest

# Texts beyond this are not looked at.
LONGEST = 1 << 20
# Where nothing crosses the link, drafting has to gain this much before it is recommended: predictions are no better.
WORTH = 1.1


@dataclass(frozen=True)
class Way:
    """One way to decode: its settings, what they take, and what of that is not there."""

    settings: Settings
    used: Footprint
    missing: list[dict[str, int | str]]

    @property
    def on_card(self) -> bool:
        """Whether the whole KV cache lies on the card while decoding: no pass fetches anything."""
        plan = self.used.plan
        return plan is None or plan.resident_bytes == plan.layers * plan.tiles * plan.tile_bytes


@dataclass(frozen=True)
class PlanReport:
    """Two ways to decode compared, each with its own split of the memory.

    Attributes:
        hierarchy, plain: the two ways; one and the same where gamma is given as 0.
        way: the one to take, "hierarchy" or "plain": what fits and is faster, or what was asked for.
        suggestions: what would fit, where nothing does.
        prediction: of both ways; None where the one to take does not fit.
        pays_from: where plain decoding is the way to take, the length of text from which the hierarchy is faster, in
            steps of 1,024 tokens; None if there is none that fits.
        packed_fits: where the cache has to be streamed, the options under which all of it would stay on the card.
    """

    question: PlanQuery
    hierarchy: Way
    plain: Way
    way: str
    suggestions: list[dict[str, str]]
    prediction: Prediction | None
    pays_from: int | None
    packed_fits: str | None
    assumptions: list[str]

    @property
    def chosen(self) -> Way:
        """The way to take."""
        return self.plain if self.way == "plain" else self.hierarchy

    @property
    def settings(self) -> Settings:
        """Of the way to take."""
        return self.chosen.settings

    @property
    def used(self) -> Footprint:
        """By the way to take."""
        return self.chosen.used

    @property
    def missing(self) -> list[dict[str, int | str]]:
        """For the way to take."""
        return self.chosen.missing

    @property
    def drafting(self) -> Prediction | None:
        """The prediction, where the hierarchy fits and drafts at all."""
        return None if self.hierarchy.missing or not self.hierarchy.settings.gamma else self.prediction

    @property
    def ms_per_token(self) -> float | None:
        """Of the way to take; None where it does not fit."""
        told = self.prediction
        return told and (told.plain_ms if self.way == "plain" else told.round.ms_per_token)


def make_report(question: PlanQuery) -> PlanReport:
    """Whether it fits, what lies where, and how fast it will be.

    Raises:
        InputError: settings that contradict each other.
    """
    hierarchy = _way(question)
    plain = _plain(question) if hierarchy.settings.gamma else hierarchy
    told = None if hierarchy.missing and plain.missing else _predict(question, hierarchy, plain)
    way = _better(question, hierarchy, plain, told)
    chosen = plain if way == "plain" else hierarchy
    return PlanReport(
        question,
        hierarchy,
        plain,
        way,
        suggest(question) if chosen.missing else [],
        None if chosen.missing else told,
        _pays_from(question) if way == "plain" and "gamma" not in question.fixed else None,
        None if chosen.missing or chosen.on_card else _packed_fits(question),
        _assumptions(
            question, hierarchy, None if hierarchy is plain or hierarchy.missing or chosen.used.plan is None else told
        ),
    )


def best_ms(question: PlanQuery) -> float | None:
    """Predicted milliseconds per token by the faster way; None where neither fits."""
    hierarchy = _way(question)
    plain = _plain(question) if hierarchy.settings.gamma else hierarchy
    if hierarchy.missing and plain.missing:
        return None
    told = _predict(question, hierarchy, plain)
    return told.plain_ms if _better(question, hierarchy, plain, told) == "plain" else told.round.ms_per_token


def _way(question: PlanQuery, **changes: Any) -> Way:
    """The best settings for a question, some of them given."""
    settings = question.choose(**changes)
    used = footprint(question.model, settings, question.context, question.draft)
    return Way(settings, used, missing(used, question.machine.memory, question.machine.host))


def _plain(question: PlanQuery) -> Way:
    """Plain decoding: no draft model, no retrieval cache to speak of, and all the more resident tiles."""
    fixed = tuple(name for name in question.fixed if name != "budget")
    settings = replace_settings(question.settings, {"budget": None})
    return _way(replace(question, settings=settings, fixed=fixed, draft=None, draft_kind="none"), gamma=0)


def _predict(question: PlanQuery, hierarchy: Way, plain: Way) -> Prediction:
    """Each way by its own settings."""
    asked, machine = question, question.machine
    rates = assume(hierarchy.settings, asked.context, asked.draft_kind, asked.retrieval, asked.drafted)
    return predict(asked.model, hierarchy.settings, asked.context, machine, rates, asked.draft, plain.settings)


def _better(question: PlanQuery, hierarchy: Way, plain: Way, told: Prediction | None) -> str:
    if hierarchy is plain:
        return "plain"
    if told is None or "gamma" in question.fixed:
        return "hierarchy"
    if hierarchy.missing or plain.missing:
        return "plain" if hierarchy.missing else "hierarchy"
    return "hierarchy" if _gains(plain, told) else "plain"


def _gains(plain: Way, told: Prediction) -> bool:
    """Whether drafting pays."""
    return told.plain_ms > told.round.ms_per_token * (WORTH if plain.on_card else 1.0)


def _pays_from(question: PlanQuery) -> int | None:
    """The shortest longer text, in steps of 1,024 tokens, at which the hierarchy fits and is faster."""
    most = min(question.model.layout.max_positions or LONGEST, LONGEST) // 1024
    low = high = -(-question.context // 1024)
    while not _pays(question, high * 1024):
        if high >= most:
            return None
        low, high = high, min(most, high + high // 2 + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _pays(question, middle * 1024) else (middle, high)
    return high * 1024


def _pays(question: PlanQuery, context: int) -> bool:
    longer = replace(question, context=context)
    hierarchy = _way(longer)
    if hierarchy.missing:
        return False
    plain = _plain(longer)
    told = _predict(longer, hierarchy, plain)
    return bool(plain.missing) or _gains(plain, told)


def _packed_fits(question: PlanQuery) -> str | None:
    """The quantisation that makes room for the whole KV cache on the card, the one that changes least first."""
    for model in sorted(question.variants, key=lambda model: -model.weights.total):
        way = _plain(replace(question, model=model))
        if not way.missing and way.on_card:
            return model.packing
    return None


def _assumptions(question: PlanQuery, hierarchy: Way, told: Prediction | None) -> list[str]:
    """Of the machine, and of drafting where that is predicted: each that the figures stand on."""
    said = list(question.machine.said)
    if told is None:
        return said
    rates, settings = told.assumed, hierarchy.settings
    ranks = rates.by_rank(settings.rule).ranks[: settings.topk]
    source = ", from Qwen2.5-Coder-1.5B on 24K tokens of source code; yours will differ"
    first = f"the target takes the retrieval level's first choice in {rates.retrieval:.1%} of places"
    said.append(first + (" (as given)" if question.retrieval is not None else source))
    if settings.topk > 1:
        said.append(
            f"it takes one of the first {len(ranks)} in {sum(ranks):.1%}; how sure the retrieval level is differs from "
            "place to place as on SmolLM2, and independently"
        )
    said.append(f"the retrieval level accepts {rates.draft:.0%} of the draft's tokens ({question.draft_kind})")
    if told.round.hidden:
        said.append(
            f"{told.round.hidden:.0f} of {told.round.steps + told.round.hidden:.0f} drafting steps per pass cost "
            "nothing: they are made while it waits for tiles. What its verdict rules out is lost"
        )
    plan = hierarchy.used.plan
    if plan is not None and plan.coded_bytes:
        said.append(
            f"coded tiles take {plan.wire_bytes / plan.tile_bytes:.0%} of their bytes in host memory and on the link, "
            "and none has to go raw; decoding reads and writes each once more"
        )
    return [*said, "times of kernels from bandwidth and TFLOPS alone; sampling and tokenising are left out"]
