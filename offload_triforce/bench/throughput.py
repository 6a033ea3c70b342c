"""How fast it is: ways to decode the same from the same prompt, at several contexts, against the limit of the link."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from packaging.version import Version

from offload_triforce.bench.answering import Case, Read
from offload_triforce.bench.contenders import (
    OURS,
    WAYS,
    Outcome,
    answer_ours,
    answer_theirs,
    streamed_bytes,
)
from offload_triforce.bench.pace import Pace
from offload_triforce.bench.slow_motion import calibrate, named
from offload_triforce.bench.stage import Say, Stage, ThroughputQuery, card_machine, check, set_up
from offload_triforce.bench.tasks import TASKS, find_task, long_text, prompts
from offload_triforce.errors import MemoryLimitError, TriForceError
from offload_triforce.generation.checks import check_length
from offload_triforce.generation.prompt import build_prompt
from offload_triforce.machine.describe import describe_machine
from offload_triforce.machine.measure import free_memory
from offload_triforce.machine.memory import free_on_host
from offload_triforce.planner.sizes import activation_bytes

TASK = "explain"  # that is asked where there is but one
# What is compared where there is no link: names for people, and a way, another, and the figure of both.
RATIOS = {
    "plain / transformers, ms per token": ("plain", "transformers-cpu", "ms_per_token"),
    "default / transformers, ms per token": ("best", "transformers-cpu", "ms_per_token"),
    "default / plain, ms per token": ("best", "plain", "ms_per_token"),
    "default / transformers, time to first token": ("best", "transformers-cpu", "ttft_s"),
}
SOUND = Version("5.23")  # of transformers: from here on its offloaded cache waits for its copies

Keep = Callable[[dict[str, Any]], None]


def bench_throughput(
    asked: ThroughputQuery, say: Say = lambda line: None, keep: Keep = lambda report: None
) -> dict[str, Any]:
    """Measure.

    Args:
        asked: what. say: told what is going on. keep: given the report so far after each answer.

    Returns:
        For JSON: ``machine``, ``emulated`` (None, or the card and the factor), ``link``, ``rows`` (one per way and
        context; figures are absent where ``skipped`` gives a reason) and ``limits`` (one per context).

    Raises:
        InputError: before anything is read. TriForceError: our ways differ in fp32, which must not happen.
    """
    check(asked)
    stage = set_up(asked, say)
    engine = stage.engine
    cases = {}
    for context in asked.lengths:
        for task, prompt in _prompts(stage, context, asked.bare).items():
            check_length(engine.layout, engine.settings, len(prompt), asked.new_tokens)
            cases[context, task] = Case(prompt, asked.new_tokens)
    if asked.card is not None:
        longest = max(context for context, _ in cases)
        say(f"timing steps and passes without a link, {longest:,} tokens of text")
        machine = card_machine(asked)
        stage.slow = calibrate(engine.model, engine.layout, machine, longest)
        stage.gbps = stage.slow.gbps
        say(f"everything is {stage.slow.factor:,.1f} times slower than on a {machine.name}: link {stage.gbps:.3g} GB/s")
    report = {
        "machine": describe_machine(),
        "model": asked.model,
        "dtype": str(engine.layout.dtype).removeprefix("torch."),
        "device": engine.layout.device.type,
        "emulated": stage.slow.as_dict() if stage.slow else None,
        "link": {"gbps": stage.gbps, "what": stage.link},
        "vram_cap_bytes": asked.vram,
        "new_tokens": asked.new_tokens,
        "notes": _notes(stage),
        "rows": [],
        "limits": [],
    }
    for (context, task), case in cases.items():
        report["limits"].append(_limit(stage, context, case) | {"task": task})
        run_context(stage, context, case, asked.ways, report, say, keep, task)
        if asked.bare:
            report["against_transformers"] = against_transformers(report["rows"])
            keep(report)
    return report


def _prompts(stage: Stage, context: int, every: bool) -> dict[str, list[int]]:
    """Token ids by task: of ``every`` one, or of one alone."""
    tokenizer, task = stage.engine.tokenizer, find_task(TASK)
    if every:
        return {task.name: ids for task, ids in prompts(tokenizer, TASKS, context).items()}
    return {task.name: build_prompt(tokenizer, long_text(task.text, tokenizer, context), task.ask)}


def against_transformers(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What ours take, over what transformers and plain take on the same prompt: means and worst cases over the tasks.

    Figures are absent where a way was not run.
    """
    found: dict[tuple[int, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if not row["skipped"]:
            found.setdefault((row["context"], row["task"]), {})[row["way"]] = row
    summary = {}
    for name, (way, other, figure) in RATIOS.items():
        both = [ways for ways in found.values() if way in ways and other in ways and ways[other][figure]]
        ratios = [ways[way][figure] / ways[other][figure] for ways in both]
        if ratios:
            summary[name] = {"mean": statistics.mean(ratios), "worst": max(ratios), "tasks": len(ratios)}
    return summary


def run_context(
    stage: Stage,
    context: int,
    case: Case,
    ways: Sequence[str],
    report: dict[str, Any],
    say: Say,
    keep: Keep,
    task: str = TASK,
) -> None:
    """Let every way answer one prompt, of a ``task`` by name; adds to the report's rows.

    Raises:
        TriForceError: two of our ways differ in fp32.
    """
    answers: dict[str, list[int]] = {}
    read = None
    ours = [way for way in OURS if way in ways]
    if ours and stage.engine.layout.device.type == "cpu":
        say(f"{context:,} tokens: reading")
        read = Read.of(stage.engine, case.prompt)
    for way in [*ours, *(way for way in ways if way not in OURS)]:
        say(f"{context:,} tokens: {way}")
        if way not in OURS:
            read = None  # gives its memory back
        row = {"way": way, "title": WAYS[way], "context": context, "task": task, "prompt_tokens": len(case.prompt)}
        row["skipped"] = None
        found = _answer(stage, way, case, read)
        if isinstance(found, str):
            row["skipped"] = found
        else:
            answers[way] = found.tokens
            row |= found.figures | _compared(stage, found, next(iter(answers.values())))
        report["rows"].append(row)
        keep(report)
        free_memory()
    _judge(stage, {way: tokens for way, tokens in answers.items() if way in OURS})


def _answer(stage: Stage, way: str, case: Case, read: Read | None) -> Outcome | str:
    """What a way says, or why it cannot."""
    if reason := _unavailable(stage, way, case):
        return reason
    try:
        if way in OURS:
            return answer_ours(stage.engine, way, case, read, stage.make_device, stage.slow and Pace(stage.slow.pauses))
        if way == "transformers-offloaded":
            return answer_theirs(stage.engine.model, case, offloaded=True)
        return answer_theirs(stage.model_on_cpu, case, offloaded=False)
    except MemoryLimitError as error:
        return str(error)
    except torch.OutOfMemoryError:
        return "does not fit into the device's memory"


def _unavailable(stage: Stage, way: str, case: Case) -> str | None:
    """Why a way of transformers' cannot be run here, if so."""
    layout = stage.engine.layout
    cuda = layout.device.type == "cuda"
    if way == "transformers-offloaded":
        if not cuda:
            return "transformers offloads its cache from CUDA devices only, and there is none here"
        if Version(transformers.__version__) < SOUND:
            return f"its copies lack a wait before {SOUND}, and tokens may be wrong; this is {transformers.__version__}"
        if stage.h2d:
            return "its copies cannot be slowed: leave --link out to compare with it"
    if way == "transformers-cpu" and stage.slow is not None:
        return f"it would run at this machine's own pace, in no proportion to the {stage.slow.card}'s"
    if way == "transformers-cpu":
        tokens, config = case.capacity, stage.engine.model.config.get_text_config()
        needed = tokens * sum(layout.token_bytes(layer) for layer in range(len(layout.layers)))
        needed += activation_bytes(config, layout, tokens)  # the prompt is read in one piece
        if cuda:
            needed += sum(weight.nbytes for weight in stage.engine.model.parameters())
        free = free_on_host()
        if needed > free:
            return f"needs about {needed / 1e9:.1f} GB of host memory, and {free / 1e9:.1f} GB are free"
    return None


def _compared(stage: Stage, found: Outcome, first: list[int]) -> dict[str, Any]:
    """What follows from a way's figures: its own limit, the card's time, and whether it says what the first one did."""
    figures = found.figures
    crossed, ms = figures.get("link_bytes_per_token"), figures["ms_per_token"]
    slowed = stage.slow is not None and crossed is not None
    return {
        "limit_ms_per_token": None if crossed is None or stage.gbps is None else crossed / stage.gbps / 1e6,
        "card_ms_per_token": ms / stage.slow.factor if slowed else None,
        "differs_at": _difference(found.tokens, first),
    }


def _difference(tokens: list[int], others: list[int]) -> int | None:
    """The first new token that differs; None if all are equal."""
    if tokens == others:
        return None
    pairs = enumerate(zip(tokens, others, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(tokens), len(others)))


def _judge(stage: Stage, answers: dict[str, list[int]]) -> None:
    """Our ways must agree. In 16 bits, sums in another order may turn a near tie; that is reported, no more."""
    for way, tokens in answers.items():
        first, reference = next(iter(answers.items()))
        at = _difference(tokens, reference)
        if at is not None and stage.engine.layout.dtype == torch.float32:
            raise TriForceError(
                f"{way} and {first} differ from new token {at} on, which must not happen: please report it"
            )


def _limit(stage: Stage, context: int, case: Case) -> dict[str, Any]:
    """What no plain pass can beat: the bytes that it has to fetch, at the speed of the link."""
    size = streamed_bytes(stage.engine, case.capacity, len(case.prompt) - 1)
    limit = {"context": context, "bytes": size, "ms_per_token": size / stage.gbps / 1e6 if stage.gbps else None}
    return limit | {"card_ms_per_token": size / stage.slow.card_gbps / 1e6 if stage.slow else None}


def _notes(stage: Stage) -> list[str]:
    """What a reader has to know about the figures."""
    notes = [
        "greedy; ms per token is decoding alone; the draft of triforce and best is look-up in the text",
        "limit: bytes of the KV cache that a plain pass fetches, over the link's bandwidth",
        "TTFT: with all caches allocated and pinned; transformers reads the prompt in one piece",
    ]
    if stage.engine.layout.device.type == "cpu":
        notes.append(
            "TTFT of our ways: the prompt was read once for all of them, with copies beside it reckoned at the link's "
            "speed, and then each one's own first pass"
        )
    if stage.engine.layout.device.type == "cpu" and stage.slow is None:
        notes.append("transformers-cpu knows no link: it is what a device that holds the whole cache would do")
    if stage.slow is not None:
        slow = stage.slow
        notes.append(
            f"emulated, not measured on the {slow.card}: link and computation are both {slow.factor:,.1f} times slower "
            f"(link {slow.gbps:.3g} for {slow.card_gbps:g} GB/s); TTFT is in no proportion to the card's"
        )
        held_up = ", ".join(f"{named(work)} {ratio:.2f}" for work, ratio in slow.proportions.items())
        notes.append(
            f"the factor fits a {named(slow.widest)}, other work is held up; over what it should take: {held_up}"
        )
    return notes
