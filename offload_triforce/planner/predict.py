"""How fast it will be: what a model computes per layer, step and tile, handed to the scheduler's cost model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from offload_triforce.config import Settings
from offload_triforce.machine.hardware import Machine
from offload_triforce.model.outline import LayerShape, ModelShape, RecurrentShape
from offload_triforce.planner.acceptance_length import AcceptanceByRank, of_coupled, of_resampled
from offload_triforce.planner.host_work import CHOOSING, OPERATION, REPLAYED, step_operations, tile_seconds
from offload_triforce.planner.rounds import WALKED, Costs, Level0, PassCurve, pass_curve, walk_rounds
from offload_triforce.planner.sizes import group_tokens, make_plan, make_shape
from offload_triforce.planner.unpacking import unpacked_numbers
from offload_triforce.scheduler.plan import TilePlan
from offload_triforce.scheduler.simulate import (
    LinkSpeed,
    PassTime,
    PassWork,
    RoundTime,
    Speeds,
    predict_pass,
    predict_prefill,
    rounds,
)

# Acceptance by the target of a draft token of the retrieval level, by budget: measured on Qwen2.5-Coder-1.5B, 24K
# tokens of Python source, T=0.6, chunks of 8, chosen anew every 16 tokens. Never assumed better than at the largest.
ACCEPTANCE = ((1024, 0.886), (2048, 0.912), (4096, 0.944))
# The rule "coupled" misses so many times as often as the rule above, which resamples: between 1.02 and 1.30 at three
# budgets and two temperatures (``among_first`` against ``acceptance`` in benchmarks/results/retrieval_cpu.json).
COUPLED_MISSES = 1.2
# Acceptance by the retrieval level of a token that a drafter is asked for. Look-up in the text often has none to offer:
# TriForce's chains take 10.2 steps for 12 tokens where the text is drawn (benchmarks/results/speculation_cpu.json, 10
# cells; 8.2 where it is greedy, which is 0.35). The others are assumptions: a small model of the same family, an MTP
# head that is fed on with what it makes.
DRAFT_ACCEPTANCE = {"ngram": 0.15, "none": 0.0, "self": 0.8, "model": 0.6, "mtp": 0.65}


@dataclass(frozen=True)
class Assumed:
    """How often the target takes the retrieval level's first choice, and the retrieval level the drafter's token."""

    retrieval: float
    draft: float

    def by_rank(self, rule: str) -> AcceptanceByRank:
        """With the later choices: as measured, in proportion to what the first misses. ``rule``: of acceptance."""
        return (of_coupled() if rule == "coupled" else of_resampled()).scaled(self.retrieval)


@dataclass(frozen=True)
class Prediction:
    """Times in seconds, if not said otherwise."""

    round: RoundTime
    passing: PassTime
    plain: PassTime
    prefill_s: float
    assumed: Assumed

    @property
    def plain_ms(self) -> float:
        """Milliseconds per token without speculation: one pass each."""
        return 1e3 * self.plain.seconds


def assumed_acceptance(budget: int) -> float:
    """ACCEPTANCE between its budgets (straight lines over the logarithm), and going on below."""
    points = [(math.log2(size), rate) for size, rate in ACCEPTANCE]
    x = math.log2(budget)
    if x >= points[-1][0]:
        return points[-1][1]
    (x0, y0), (x1, y1) = (points[1], points[2]) if x >= points[1][0] else (points[0], points[1])
    return max(0.0, y0 + (y1 - y0) * (x - x0) / (x1 - x0))


def first_choice(budget: int, rule: str) -> float:
    """How often the target takes the retrieval level's first choice, by an acceptance rule."""
    return 1 - (1 - assumed_acceptance(budget)) * (COUPLED_MISSES if rule == "coupled" else 1.0)


def layer_seconds(model: ModelShape, speeds: Speeds, tokens: int) -> float:
    """The matrix products of one decoder layer in a step of a few tokens: its weights are read once."""
    weights = model.weights
    touched = 1 - (1 - weights.expert_share) ** tokens  # experts that some token chooses
    size = weights.layer + touched * weights.experts + written_out(model, speeds, tokens)
    parameters = weights.layer_parameters + weights.expert_share * weights.expert_parameters
    return speeds.seconds(size, 2 * parameters * tokens)


def mixing_flops(model: ModelShape, shape: LayerShape | RecurrentShape, tokens: int, reach: int) -> int:
    """Operations of one layer that tell tokens of each other: attention to ``reach`` others each, or the delta rule.

    The rule reads and writes its state once per token, and what tokens of a block tell each other is about as much.
    """
    if isinstance(shape, RecurrentShape):
        return 8 * shape.value_heads * shape.key_dim * shape.value_dim * tokens
    return 4 * model.heads * shape.head_dim * reach * tokens


def written_out(model: ModelShape, speeds: Speeds, tokens: int) -> float:
    """Bytes of a mean layer's 4-bit weights that a step of so many tokens writes out, and then reads again."""
    weights = model.weights
    numbers = unpacked_numbers(weights.unpacked, tokens, weights.itemsize, speeds.cc, speeds.sms)
    return 2 * weights.itemsize * numbers / len(model.layout.layers)


def pass_work(model: ModelShape, plan: TilePlan, speeds: Speeds, tokens: int, refresh: bool) -> PassWork:
    """A pass with that many queries. ``refresh``: chunks are scored and chosen as the tiles go by."""
    layout, layer = model.layout, layer_seconds(model, speeds, tokens)
    gaps, pending = [], 0.0
    streamed = set(layout.full)
    for index in range(len(layout.layers)):
        if index not in streamed:
            pending += layer + speeds.seconds(layout.held_bytes(index, plan.tiles * plan.tile_tokens))
            continue
        gaps.append(pending + layer / 2)  # projections and what else comes before the attention
        pending = layer / 2
    gaps.append(pending + speeds.seconds(model.weights.head, 2 * model.weights.head_parameters * tokens))
    flops = (4 + 2 * refresh) * model.heads * plan.head_dim * plan.tile_tokens * tokens
    tile = speeds.seconds((1.5 if refresh else 1.0) * plan.tile_bytes, flops)  # scoring reads the keys again
    issue = OPERATION * (step_operations(model) / plan.layers + refresh * CHOOSING)
    # Decoding reads the coded tile and writes it out, which the attention reads then: nothing is taken to be fused.
    decode = speeds.seconds(plan.coded_bytes + plan.tile_bytes) if plan.coded_bytes else 0.0
    return PassWork(tuple(gaps), tile, issue, *tile_seconds(refresh, plan.coded_bytes > 0), decode)


def predict_target(
    model: ModelShape, settings: Settings, context: int, machine: Machine, tokens: int, refresh: bool
) -> PassTime:
    """One pass over ``context`` tokens."""
    plan = make_plan(model.layout, settings, context)
    if plan is None:  # nothing is streamed
        return PassTime(resident_step(model, settings, context, machine.speeds, tokens, OPERATION), 0.0, 0.0)
    tail = make_shape(settings, context).tail_needed(settings.news)
    tiles = max(0, context - tail) // plan.tile_tokens
    work = pass_work(model, plan, machine.speeds, tokens, refresh)
    # Bandwidths are those of copies of a tile's size, so what a copy costs beside its bytes is in them already.
    return predict_pass(plan, tiles, LinkSpeed(machine.link_gbps), work)


def resident_step(
    model: ModelShape, settings: Settings, context: int, speeds: Speeds, tokens: int, launch: float = 0.0
) -> float:
    """Seconds of a step over caches that lie on the device: windows, and the retrieval cache. All is read once.

    ``launch``: seconds from one operation to the next; a step takes no less than that for all of them.
    """
    held = make_shape(settings, context)
    layout, seconds, full = model.layout, 0.0, set(model.layout.full)
    for index, shape in enumerate(layout.layers):
        size = layout.held_bytes(index, held.near(0, 0) if index in full else context)
        if index in full:
            size += shape.kv_heads * held.chosen_bytes(shape.head_dim, layout.dtype.itemsize)
        seconds += layer_seconds(model, speeds, tokens) + speeds.seconds(size)
    seconds += speeds.seconds(model.weights.head, 2 * model.weights.head_parameters * tokens)
    return max(seconds, step_operations(model) * launch)


def step_seconds(
    model: ModelShape, settings: Settings, context: int, speeds: Speeds, tokens: int | None = None
) -> float:
    """A step of the retrieval level: the weights and the retrieval cache are read once. ``tokens``: None for most."""
    launch = REPLAYED if settings.graphs else OPERATION
    tokens = settings.width + settings.gamma1 if tokens is None else tokens
    return resident_step(model, settings, context, speeds, tokens, launch)


def draft_seconds(draft: ModelShape | None, settings: Settings, speeds: Speeds) -> float:
    """All that a draft model drafts for one step of the retrieval level; look-up in the text costs nothing here.

    Steps of an MTP head are not captured.
    """
    if draft is None:
        return 0.0
    reach = Settings(budget=settings.draft_cache, graphs=settings.graphs, sink=0, recent=1, chunk=1, bits=16)
    launch = REPLAYED if settings.graphs and not draft.reads_hidden else OPERATION
    return settings.gamma1 * resident_step(draft, reach, settings.draft_cache, speeds, 1, launch)


def prefill_seconds(model: ModelShape, settings: Settings, context: int, machine: Machine) -> float:
    """Reading the prompt: all layers' products and attention, each layer's KV leaving beside the next layer.

    Groups bring up what was read before. Hidden states in host memory come and go beside the computation.
    What is resident late comes up at the end.
    """
    layout, weights, speeds = model.layout, model.weights, machine.speeds
    chunks = -(-context // settings.prefill_chunk)
    parameters = weights.layer_parameters + weights.expert_share * weights.expert_parameters
    products = chunks * speeds.seconds(written_out(model, speeds, settings.prefill_chunk))
    products += chunks * speeds.seconds(weights.layer + weights.experts, 2 * parameters * context / chunks)
    link, plan = machine.link_gbps * 1e9, make_plan(layout, settings, context)
    ratio = plan.wire_ratio if plan is not None else 1.0
    early = (settings.resident if settings.prefill_resident is None else settings.prefill_resident) or 0.0
    states = 0.0
    if settings.hidden_states == "host":
        states = context * model.config.get_text_config().hidden_size * layout.dtype.itemsize / link
    # Each group but the first brings up what was read before it: of g groups, (g - 1) / 2 times the whole.
    again = (-(-context // group_tokens(layout)) - 1) / 2
    computing, copying = [], []
    full = set(layout.full)
    for index, shape in enumerate(layout.layers):
        computed = products + speeds.seconds(0, mixing_flops(model, shape, context, layout.reach(index, context // 2)))
        leaves = context * layout.token_bytes(index) * (1 - early) if index in full else 0
        if ratio > 1:  # tiles are read and written once more, coded on their way out and decoded on their way back
            computed += (1 + again) * speeds.seconds(leaves * (1 + 1 / ratio))
        computing.append(max(computed, states))
        copying.append((1 + again) * leaves / ratio / link)
    return predict_prefill(computing, copying, chunks) + (plan.late_bytes / ratio / link if plan is not None else 0.0)


def path_seconds(
    model: ModelShape,
    settings: Settings,
    context: int,
    speeds: Speeds,
    assumed: Assumed,
    draft: ModelShape | None,
) -> float:
    """What it takes to draft a single path of ``gamma`` tokens: by it, the draft tokens of level 0 are compared."""
    step = step_seconds(model, settings, context, speeds) + draft_seconds(draft, settings, speeds)
    return rounds(settings.gamma, settings.gamma1, assumed.draft) * step


def passes(model: ModelShape, settings: Settings, context: int, machine: Machine) -> PassCurve:
    """Passes that verify, by the number of their tokens."""
    refresh = settings.refresh and settings.gamma > 0
    return pass_curve(settings.block, lambda tokens: predict_target(model, settings, context, machine, tokens, refresh))


def round_time(
    model: ModelShape,
    settings: Settings,
    context: int,
    machine: Machine,
    assumed: Assumed,
    draft: ModelShape | None,
    curve: PassCurve,
    walked: int = WALKED,
) -> RoundTime:
    """Drafting, what of it passes hide, and the pass that verifies it. ``curve``: of ``passes``. ``walked``: rounds."""
    if not settings.gamma:
        return RoundTime(curve.passes[0].seconds, 0.0, 0.0, 0.0, 1.0)
    plan, speeds, width = make_plan(model.layout, settings, context), machine.speeds, settings.width + settings.gamma1
    one, most = (step_seconds(model, settings, context, speeds, tokens) for tokens in (1, width))
    covered = plan.ring_bytes / (machine.link_gbps * 1e9) if plan is not None else 0.0
    costs = Costs(curve, covered, one, (most - one) / max(1, width - 1), draft_seconds(draft, settings, speeds))
    return walk_rounds(assumed.by_rank(settings.rule), Level0(assumed.draft), settings, costs, None, walked)


def predict(
    model: ModelShape,
    settings: Settings,
    context: int,
    machine: Machine,
    assumed: Assumed,
    draft: ModelShape | None = None,
    plain: Settings | None = None,
) -> Prediction:
    """Prefill, plain decoding and decoding through the hierarchy at a text of ``context`` tokens.

    ``plain``: settings of plain decoding, where they are others. The prefill takes about as long either way.
    """
    alone = predict_target(model, plain or settings, context, machine, 1, refresh=False)
    curve = passes(model, settings, context, machine)
    timing = round_time(model, settings, context, machine, assumed, draft, curve)
    return Prediction(
        timing, curve.at(timing.picked + 1), alone, prefill_seconds(model, settings, context, machine), assumed
    )
