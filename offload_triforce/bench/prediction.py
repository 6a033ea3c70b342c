"""Is the cost model right? Passes and whole answers as predicted, against the same plan run over a link.

Predicted is time. The model is told what the computation takes (a pass with all tiles on the device, piece by piece; an
answer likewise, for steps of the retrieval level and for what else a round takes) and what the link gives. Then it
walks the plan that the pipeline executes. How many passes and steps an answer takes depends on the text: a prediction
is made once from the numbers that the run itself counted, and once from acceptance alone, as ``plan`` makes it: how
often the target took level 1's first choice, its second and so on, and how often that took a token of level 0.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from offload_triforce.bench.answering import Answering, Case, Read
from offload_triforce.bench.contenders import OURS, settings_for
from offload_triforce.bench.pipeline import two_digits
from offload_triforce.bench.subject import QUERIES, Subject
from offload_triforce.bench.texts import demo_prompt
from offload_triforce.bench.work import REPEATS, Works, median_work, pieces
from offload_triforce.config import Settings, replace_settings
from offload_triforce.engine import TriForce
from offload_triforce.generation.checks import check_context, check_length
from offload_triforce.machine.describe import describe_machine
from offload_triforce.machine.measure import free_memory, link_ceiling
from offload_triforce.model.fetch import find_source
from offload_triforce.model.loader import max_positions
from offload_triforce.planner.acceptance_length import of_coupled
from offload_triforce.planner.rounds import Costs, Level0, pass_curve, walk_rounds
from offload_triforce.planner.sizes import make_plan
from offload_triforce.scheduler.device import CudaDevice, Device
from offload_triforce.scheduler.emulated import EmulatedDevice
from offload_triforce.scheduler.plan import TILE_BYTES, TilePlan
from offload_triforce.scheduler.simulate import LinkSpeed, PassTime, RoundTime, predict_pass
from offload_triforce.speculation.stats import DecodeStats

# Emulated links: a pass of QUERIES tokens takes so many times as long as its computation.
DOMINANCE = (1.0, 3.0, 6.0)
NO_LINK = LinkSpeed(math.inf)


@dataclass(frozen=True)
class Site:
    """Where it runs: the model, a prompt that has been read, and how its link is to be had."""

    engine: TriForce
    case: Case
    read: Read | None

    @property
    def cuda(self) -> bool:
        """Whether the link is real."""
        return self.engine.layout.device.type == "cuda"

    def device(self, gbps: float | None) -> Device:
        """With a link of that speed, if it can be chosen."""
        return CudaDevice(self.engine.layout.device) if self.cuda else EmulatedDevice(gbps)

    def settings(self, way: str, linked: bool) -> Settings:
        """Of one of OURS. Where no link is wanted, the whole cache is on the device: nothing is copied."""
        capacity = self.case.capacity
        settings = settings_for(way, self.engine.layout, capacity)
        plan = make_plan(self.engine.layout, settings, capacity)
        fixed = {"budget": settings.budget_for(capacity), "tile": plan.tile_tokens, "ring": plan.ring}
        return replace_settings(settings, fixed | {"resident": 0.0 if linked else 1.0})

    @contextmanager
    def subject(self, way: str, linked: bool) -> Iterator[Subject]:
        """Passes of one of OURS, with random keys and values; an emulated link is yet to be set."""
        settings, text = self.settings(way, linked), torch.tensor(self.case.prompt)
        subject = Subject(self.engine.model, settings, text, self.device(None))
        try:
            subject.fill()
            yield subject
        finally:
            subject.close()
            free_memory()

    def works(self, way: str) -> Works:
        """What one of OURS computes."""
        with self.subject(way, linked=False) as subject:
            return Works(subject)


def bench_prediction(
    model: str,
    tokens: int,
    new_tokens: int,
    link_gbps: Sequence[float] | None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Predict and measure.

    Args:
        model: of ``fetch.MODELS``, or whatever ``TriForce.load`` takes.
        tokens: of text. new_tokens: of each answer.
        link_gbps: emulated links, GB/s; None takes DOMINANCE. A real link is what it is.
        say: told what is going on.

    Returns:
        For JSON: ``machine``, and in ``passes`` and ``answers`` a row for each link, with seconds or milliseconds
        ``predicted`` and ``measured``, and their ``ratio``.
    """
    source = find_source(model)
    check_context(tokens + new_tokens, max_positions(source))
    say(f"loading {model}")
    engine = TriForce.load(source, "ngram")
    case = Case(demo_prompt(engine, tokens), new_tokens)
    check_length(engine.layout, engine.settings, len(case.prompt), new_tokens)
    say("reading the text")
    site = Site(engine, case, None if engine.layout.device.type == "cuda" else Read.of(engine, case.prompt))
    with _core_for_copies(site):
        say("timing passes without a link, piece by piece")
        works = {way: site.works(way) for way in OURS}
        passes, speeds = _passes(site, works["best"], link_gbps, say)
        answers = [row for way in OURS for row in _answers(site, works[way], way, speeds, say)]
        return {
            "machine": describe_machine(),
            "model": model,
            "dtype": str(engine.layout.dtype).removeprefix("torch."),
            "link": "measured" if site.cuda else "emulated",
            "prompt_tokens": len(case.prompt),
            "new_tokens": new_tokens,
            "passes": passes,
            "answers": answers,
        }


@contextmanager
def _core_for_copies(site: Site) -> Iterator[None]:
    """An emulated copy engine needs a core of its own, or else copies slow the computation, as they do on no GPU."""
    before = torch.get_num_threads()
    if not site.cuda:
        torch.set_num_threads(max(1, before - 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _passes(
    site: Site, works: Works, link_gbps: Sequence[float] | None, say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], Sequence[float]]:
    """A row for each link and number of queries; and the links.

    Passes without a link and with one take turns, so that a machine whose clock drifts is as fast for both.
    """
    rows = []
    with site.subject("best", linked=True) as subject, site.subject("best", linked=False) as unlinked:
        full = subject.runtime.caches.full
        plan, tiles = full.stream.plan, full.tiles
        speeds = _speeds(site, link_gbps, plan, tiles, works)
        for gbps in speeds:
            say(f"passes at {gbps:.3g} GB/s")
            if not site.cuda:
                subject.device.gbps = gbps
            for queries in (1, QUERIES, subject.settings.block):
                for either in (subject, unlinked):
                    either.verify(queries)  # the first pass warms up
                turns = [(pieces(unlinked, queries, tiles), subject.verify(queries)) for _ in range(REPEATS)]
                computed, took = zip(*turns, strict=True)
                told = predict_pass(plan, tiles, LinkSpeed(gbps), median_work(computed))
                row = {"gbps": gbps, "queries": queries, "link_s": told.link}
                rows.append(row | _compared("s", told.seconds, statistics.median(took)))
    return rows, speeds


def _speeds(site: Site, link_gbps: Sequence[float] | None, plan: TilePlan, tiles: int, works: Works) -> Sequence[float]:
    if site.cuda:
        return [link_ceiling(site.engine.layout.device, min(TILE_BYTES, plan.tile_bytes))["h2d_gbps"]]
    computed = predict_pass(plan, tiles, NO_LINK, works.of(QUERIES)).seconds
    size = plan.streamed_bytes(tiles)
    return link_gbps or [two_digits(size / (computed * factor) / 1e9) for factor in DOMINANCE]


def _answers(
    site: Site, works: Works, way: str, speeds: Sequence[float], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row for each link: one of OURS answers."""
    say(f"{way}: an answer without a link")
    free, plan, tiles = _answer(site, way, None)
    told = predict_pass(plan, tiles, NO_LINK, works.of(free.draft_tokens / free.passes + 1))
    rest = (free.decode_s - free.draft_s) / free.passes - told.seconds  # of a round, beside its steps and its pass
    rows = []
    for gbps in speeds:
        say(f"{way}: at {gbps:.3g} GB/s")
        run, plan, tiles = _answer(site, way, gbps)
        work, step = works.of(run.draft_tokens / run.passes + 1), step_like(run, free, works.step_token)
        passing = predict_pass(plan, tiles, LinkSpeed(gbps), work).seconds + rest
        told = from_counts(run, passing, step)
        costs = _costs(plan, tiles, LinkSpeed(gbps), works, rest, step - works.step_token * _width(run))
        row = {"gbps": gbps, "way": way, "tokens_per_pass": run.tokens_per_pass}
        row |= {"steps_per_pass": run.steps / run.passes, "hidden_steps_per_pass": run.steps_ahead / run.passes}
        row |= _compared("ms_per_token", told.ms_per_token, run.ms_per_token)
        if run.steps:
            alone = from_rates(run, site.settings(way, linked=True), costs, site.case.new_tokens)
            row |= {"predicted_from_rates": alone.ms_per_token, "tokens_per_pass_from_rates": alone.tokens}
            row |= {"steps_per_pass_from_rates": alone.steps + alone.hidden, "ranks": run.ranks}
            row |= {"ratio_from_rates": alone.ms_per_token / run.ms_per_token}
        rows.append(row)
    return rows


def step_like(run: DecodeStats, free: DecodeStats, token_s: float) -> float:
    """Seconds of a step of ``run``, by those of a ``free`` run: the slower the link, the wider the steps that pay."""
    if not run.steps or not free.steps:
        return 0.0
    wider = run.step_tokens / run.steps - free.step_tokens / free.steps
    return free.draft_s / free.steps + token_s * wider


def from_counts(run: DecodeStats, pass_s: float, step_s: float) -> RoundTime:
    """An answer's mean round, by its numbers of passes, steps and tokens. Steps that a pass hid cost nothing."""
    steps = (run.steps - run.steps_ahead) / run.passes
    return RoundTime(pass_s, step_s, 0.0, steps, run.new_tokens / run.passes)


def from_rates(run: DecodeStats, settings: Settings, costs: Costs, new_tokens: int) -> RoundTime:
    """The same from nothing but acceptance, as ``plan`` does it, for answers of so many tokens.

    Level 0 drafts ``gamma1`` tokens in as many steps as make up for all that it has drafted.
    """
    places, asked = sum(run.ranks), run.steps * settings.gamma1
    table = of_coupled().split([count / places for count in run.ranks[:-1]]) if places else of_coupled()
    level0 = Level0(run.draft.rate or 0.0, min(1.0, run.draft.proposed / asked) if asked else 0.0)
    return walk_rounds(table, level0, settings, costs, new_tokens)


def _width(run: DecodeStats) -> float:
    """Tokens of a step beside its first one."""
    return run.step_tokens / run.steps - 1 if run.steps else 0.0


def _costs(plan: TilePlan, tiles: int, link: LinkSpeed, works: Works, rest: float, step_1: float) -> Costs:
    """What rounds are made of, with ``rest`` seconds of each that are neither steps nor pass."""

    def passing(tokens: int) -> PassTime:
        told = predict_pass(plan, tiles, link, works.of(tokens))
        return PassTime(told.seconds + rest, told.link, told.waited)

    curve, size = pass_curve(works.most, passing), plan.streamed_bytes(tiles)
    covered = plan.ring_bytes / size * (curve.passes[0].seconds - rest) if size else 0.0
    return Costs(curve, covered, max(0.0, step_1), works.step_token)


def _answer(site: Site, way: str, gbps: float | None) -> tuple[DecodeStats, TilePlan, int]:
    """What an answer counted, and over which tiles it ran."""
    settings = site.settings(way, linked=gbps is not None)
    with Answering.warm(site.engine, settings, site.case, site.read, site.device(gbps)) as answering:
        full = answering.session.runtime.caches.full
        plan, tiles = full.stream.plan, full.tiles
        stats = answering.answer().stats
    free_memory()
    return stats, plan, tiles


def _compared(unit: str, predicted: float, measured: float) -> dict[str, Any]:
    return {"unit": unit, "predicted": predicted, "measured": measured, "ratio": predicted / measured}
