"""What should lie in the retrieval cache: ways to choose it, measured on a text that goes on as it really does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.retrieval_figures import Tally, Target, make_row
from benchmarks.retrieval_level import ChosenLevel, FullText
from benchmarks.retrieval_ways import BLOCK, LEAST_BUDGET, MULTIPLES, make_ways
from offload_triforce.bench.figures import new_figure, save
from offload_triforce.bench.speculation import SHARE, find_bench_model
from offload_triforce.bench.tasks import find_task, loops, prompts
from offload_triforce.config import Settings
from offload_triforce.engine import TriForce
from offload_triforce.errors import InputError
from offload_triforce.generation.checks import check_length
from offload_triforce.machine.describe import describe_machine
from offload_triforce.model.adapter import attached
from offload_triforce.model.fetch import find_source
from offload_triforce.runtime.reading import Reading
from offload_triforce.scheduler.device import on
from offload_triforce.speculation.acceptance import GAP

# At which a model answers, where its own answer is what is measured.
WARMTH = 0.6

Say = Callable[[str], None]


def measure(text: FullText, tokens: Sequence[int], levels: Sequence[ChosenLevel], say: Say) -> list[Tally]:
    """Go through ``tokens`` behind a text in blocks of BLOCK, by the full model and by each level.

    Each level reads the block's tokens as they are, behind keys and values that are the full model's own, as after a
    commit; its choice is made from the block before. Only whole blocks are read.
    """
    tallies = [Tally() for _ in levels]
    generator = torch.Generator(text.kv[0].device).manual_seed(0)
    blocks = len(tokens) // BLOCK
    for number in range(blocks):
        block = tokens[number * BLOCK : (number + 1) * BLOCK]
        before, begin = text.asking, text.length
        target = Target(text.step(block), generator)
        for level, tally in zip(levels, tallies, strict=True):
            asking = text.asking._replace(refreshed=before.refreshed) if level.way.when == "hindsight" else before
            level.choose(asking)
            tally.add(target, level.step(block, begin), level.mass())
        say(f"block {number + 1} of {blocks}")
    return tallies


def check_request(model: str, tokens: int | None, measured: int, budget: int | None) -> tuple[int, int]:
    """Length of the text and budget in tokens of 16 bits, as asked for or by default.

    Raises:
        InputError: one of them cannot be.
    """
    asked = find_bench_model(model)
    tokens = asked.tokens if tokens is None else tokens
    if measured < BLOCK or measured % BLOCK:
        raise InputError(f"tokens are measured in blocks of {BLOCK}: ask for a multiple of it, not for {measured}")
    budget = max(LEAST_BUDGET, tokens // SHARE) if budget is None else budget
    if budget < LEAST_BUDGET:
        raise InputError(
            f"a budget of {budget} tokens is too small for the longest chunks that are compared; take at least "
            f"{LEAST_BUDGET}"
        )
    if MULTIPLES[-1] * budget > tokens:
        raise InputError(
            f"a budget of {budget:,} tokens is too large for a text of {tokens:,}: {MULTIPLES[-1]} times as much is "
            f"measured too, so take at most {tokens // MULTIPLES[-1]:,}, or a longer text"
        )
    return tokens, budget


def bench_retrieval(
    model: str,
    tokens: int | None = None,
    measured: int = 256,
    budget: int | None = None,
    task: str = "continue",
    settings: Settings | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Compare all ways on a text of Python's own.

    Args:
        model: a name, hub id or path. tokens: length of the text that is read first; None takes the model's own.
        measured: tokens after it that are gone through, a multiple of BLOCK.
        budget: the smallest memory, as tokens in 16 bits; None is 1/SHARE of the text.
        task: of ``bench.tasks``. The text itself goes on, or else the model answers, drawing at WARMTH.
        settings: the default. say: told what is going on.

    Returns:
        For JSON: ``machine``, what was asked, ``looped`` (see ``tasks.loops``), ``rows`` (see ``make_row``; the first
        is the default) and ``taken``: of the default, how often a candidate is the target's token, by rank and by
        ``Ranking.kind``.

    Raises:
        InputError: before the work starts.
    """
    tokens, budget = check_request(model, tokens, measured, budget)
    asked = find_task(task)
    say(f"{model}: loading")
    engine = TriForce.load(find_source(model), "ngram", dtype="float32", context=tokens + measured)
    given = measured if asked.ask is None else 1  # of the tokens gone through, those that need not be drawn
    ids = prompts(engine.tokenizer, [asked], tokens + given - 1)[asked]
    if asked.ask is None:
        ids = ids[: tokens + given]  # the chat format has put a few in front
    check_length(engine.layout, Settings(), len(ids) - given, measured)
    head_dim = engine.layout.attention[0].head_dim
    ways = make_ways(settings or Settings(), budget, head_dim)
    say(f"{model}: reading {len(ids) - given:,} tokens of Python's {asked.text}")
    reading = Reading.of(engine.model, engine.layout, ids[:-given])
    with on(engine.layout.device), attached(engine.model), torch.no_grad():
        text = FullText(engine.model, engine.layout, reading, measured)
        del reading  # the text has a copy
        following = _answer(engine, text, ids[-given:], measured)
        levels = [ChosenLevel(way, text) for way in ways]
        tallies = measure(text, following, levels, lambda line: say(f"{model}: {line}, {len(ways)} ways"))
    hits, cases = tallies[0].kinds
    return {
        "machine": describe_machine(),
        "model": model,
        "task": task,
        "tokens": text.prompt,
        "measured": measured,
        "looped": loops(following),
        "budget": budget,
        "full_bytes": text.prompt * 4 * head_dim,
        "rows": [make_row(level, tally, tallies[0], head_dim) for level, tally in zip(levels, tallies, strict=True)],
        "taken": {"gap": GAP, "hits": hits.tolist(), "cases": cases.tolist()},
    }


def _answer(engine: TriForce, text: FullText, given: Sequence[int], count: int) -> list[int]:
    """``count`` tokens: those that are ``given``, and what the model draws after them if that is one alone.

    The text is left as it was.
    """
    generator = torch.Generator(engine.layout.device).manual_seed(0)
    ends = engine.model.generation_config.eos_token_id
    tokens = list(given)
    with text.undone():
        while len(tokens) < count:
            scores = text.step(tokens[-1:])[0].float() / WARMTH
            if ends is not None:  # what follows an end is no text
                scores[torch.as_tensor(ends, device=scores.device)] = float("-inf")
            tokens.append(int(torch.multinomial(scores.softmax(0), 1, generator=generator)))
    return tokens


def draw(report: dict[str, Any], path: Path) -> None:
    """Acceptance against memory, as a picture.

    Raises:
        InputError: matplotlib is not there.
    """
    figure = new_figure(7, 4.2)
    axes = figure.subplots()
    rows = [row for row in report["rows"] if row["about"] in ("default", "memory")]
    share = 100 / report["full_bytes"]
    for bits in sorted({row["bits"] for row in rows}):
        line = sorted((row["bytes"] * share, row["acceptance"]["0.6"]) for row in rows if row["bits"] == bits)
        axes.plot(*zip(*line, strict=True), marker="o", label=f"{bits} bits, chosen in each pass")
    for name, marker in (("once", "v"), ("once, 16 bits", "^"), ("newest chunks", "x")):
        row = next(row for row in report["rows"] if row["way"] == name)
        place = [row["bytes"] * share], [row["acceptance"]["0.6"]]
        axes.plot(*place, marker, color="tab:gray", label=f"{row['bits']} bits, {name.partition(',')[0]}")
    axes.set_xlabel("memory of the retrieval cache, % of the full cache in 16 bits")
    axes.set_ylabel("acceptance at temperature 0.6")
    axes.set_title(f"{report['model']}, {report['measured']} tokens after {report['tokens']:,}", fontsize=10)
    axes.legend(frameon=False)
    save(figure, path)
