"""The command ``bench speculation``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from offload_triforce.cli.common import (
    Kept,
    check_writable,
    examples,
    guarded,
)
from offload_triforce.cli.ending import paper, say
from offload_triforce.cli.options import LEAST_TEXT, AsJson, Out, Png
from offload_triforce.cli.settings import build_settings, takes_settings
from offload_triforce.cli.values import check_temperatures, read_tokens
from offload_triforce.model.fetch import check_source

EXAMPLES = examples("offload-triforce bench speculation --task explain --out out.json")


@guarded
@takes_settings(draft_cost=0.01)
def speculation(
    *,
    model: Annotated[
        list[str] | None, typer.Option(help="May be repeated; smollm2 (6K), qwen-coder (24K, slow), or any other.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="May be repeated: explain, continue, edit, question, chat; all by default.")
    ] = None,
    temperature: Annotated[list[float] | None, typer.Option(help="May be repeated; 0, 0.6 and 1 by default.")] = None,
    new_tokens: Annotated[str, typer.Option(help="Length of an answer.")] = "96",
    runs: Annotated[int, typer.Option(min=1, help="Answers per task at temperatures above 0.")] = 2,
    tokens: Annotated[
        str | None, typer.Option(help="Length of the texts, 6000 or 6K; each model's own by default.")
    ] = None,
    levers: Annotated[bool, typer.Option(help="Also each lever alone, and all but that.")] = False,
    out: Out = None,
    png: Png = None,
    as_json: AsJson = False,
    given: dict[str, Any],
) -> None:
    """Tokens per pass on real tasks, against TriForce's own setting with the same memory, in the same run."""
    settings = build_settings(given)
    check_temperatures(*(temperature or ()))
    answer = read_tokens(new_tokens, "--new-tokens", 8)
    length = None if tokens is None else read_tokens(tokens, "--tokens", LEAST_TEXT)
    check_writable(png)
    kept = Kept(out)
    for name in model or ["smollm2"]:
        check_source(name)
    from offload_triforce.bench.figures import check_pictures
    from offload_triforce.bench.speculation import MODELS, TEMPERATURES, Plan, bench_speculation
    from offload_triforce.bench.speculation_report import draw, table
    from offload_triforce.bench.tasks import TASKS, find_task

    check_pictures(png)
    tasks = [find_task(name) for name in dict.fromkeys(task)] if task else TASKS
    plan = Plan(tasks, temperature or TEMPERATURES, answer, runs, length, levers)
    report = bench_speculation(model or list(MODELS)[:1], plan, settings, say, kept)
    if as_json:
        typer.echo(json.dumps(report))
    else:
        paper().print(table(report))
    kept.close(report, shown=as_json)
    if png is not None:
        draw(report, png)
