"""The measuring commands: ``bench`` and ``trace``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from offload_triforce.cli_common import build_settings, check_folders, guarded, notes
from offload_triforce.errors import InputError

bench = typer.Typer(help="Measure, and say on what.", no_args_is_help=True)

Model = Annotated[str, typer.Option(help="smollm2 (real text) or llama-1b (random weights).")]
Tokens = Annotated[int, typer.Option(min=512, help="Length of the text.")]
Tile = Annotated[int | None, typer.Option(help="Tokens per transfer.")]
Ring = Annotated[int | None, typer.Option(help="Tiles in flight.")]
Resident = Annotated[float | None, typer.Option(help="Share of the KV cache that stays on the device, 0 to 1.")]
Queries = Annotated[int, typer.Option(min=1, help="Tokens that a pass reads: guesses, and the newest of the text.")]


@bench.command()
@guarded
def pipeline(
    model: Annotated[list[str] | None, typer.Option(help="May be repeated; smollm2 and llama-1b.")] = None,
    link_gbps: Annotated[
        list[float] | None,
        typer.Option(help="Bandwidth in GB/s; may be repeated. By default three at which the link dominates."),
    ] = None,
    tokens: Tokens = 6000,
    repeats: Annotated[int, typer.Option(min=1, help="Passes per row; the median counts.")] = 5,
    tile: Tile = None,
    ring: Ring = None,
    resident: Resident = None,
    queries: Queries = 13,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Time passes against the time that their bytes take on the link alone (emulated, without a GPU)."""
    settings = build_settings(None, tile=tile, ring=ring, resident=resident)
    if link_gbps and min(link_gbps) <= 0:
        raise InputError(f"--link-gbps must be greater than 0, not {min(link_gbps):g}")
    from offload_triforce.bench.pipeline import MODELS, bench_pipeline

    report = bench_pipeline(
        model or MODELS, settings, tokens, queries, repeats, link_gbps, lambda line: notes.print(line, style="dim")
    )
    if as_json:
        typer.echo(json.dumps(report))
        return
    table = Table()
    for name in ("model", "link GB/s", "pass MB", "bytes / link, s", "pass, s", "pass / link", "bytes / needed"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in report["results"]:
        table.add_row(*_cells(row))
    Console().print(table)


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [row["model"], f"{row['gbps']:g}", f"{row['pass_bytes'] / 1e6:.1f}", f"{row['link_s']:.3f}"]
    return [*cells, f"{row['pass_s']:.3f}", f"{row['pass_over_link']:.3f}", f"{row['bytes_over_needed']:.3f}"]


@bench.command()
@guarded
def speculation(
    model: Annotated[
        list[str] | None, typer.Option(help="May be repeated; smollm2 (6K) and qwen-coder (24K, slow).")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="May be repeated: explain, continue, edit, question, chat; all by default.")
    ] = None,
    temperature: Annotated[list[float] | None, typer.Option(help="May be repeated; 0, 0.6 and 1 by default.")] = None,
    new_tokens: Annotated[int, typer.Option(min=8, help="Length of an answer.")] = 96,
    runs: Annotated[int, typer.Option(min=1, help="Answers per task at temperatures above 0.")] = 2,
    tokens: Annotated[
        int | None, typer.Option(min=512, help="Length of the texts; each model's own by default.")
    ] = None,
    draft_cost: Annotated[
        float, typer.Option(help="What a step of the retrieval level costs, in passes: how far to guess follows.")
    ] = 0.01,
    levers: Annotated[bool, typer.Option(help="Also each lever alone, and all but that.")] = False,
    out: Annotated[Path | None, typer.Option(help="Keep the JSON here, as far as it is, text by text.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw it (needs matplotlib).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Tokens per pass on real tasks, against TriForce's own setting with the same memory, in the same run."""
    settings = build_settings(None, draft_cost=draft_cost)
    if temperature and min(temperature) < 0:
        raise InputError(f"--temperature must not be negative, not {min(temperature):g}")
    check_folders(out, png)
    from offload_triforce.bench.figures import check_pictures
    from offload_triforce.bench.speculation import MODELS, TEMPERATURES, Plan, bench_speculation
    from offload_triforce.bench.speculation_report import draw, table
    from offload_triforce.bench.tasks import TASKS, find_task

    check_pictures(png)
    tasks = [find_task(name) for name in dict.fromkeys(task)] if task else TASKS
    plan = Plan(tasks, temperature or TEMPERATURES, new_tokens, runs, tokens, levers)

    def keep(report: dict[str, Any]) -> None:
        if out is not None:
            out.write_text(json.dumps(report, indent=1))

    report = bench_speculation(
        model or list(MODELS)[:1], plan, settings, lambda line: notes.print(line, style="dim"), keep
    )
    if png is not None:
        draw(report, png)
    if as_json:
        typer.echo(json.dumps(report))
    else:
        Console().print(table(report))


@guarded
def trace(
    out: Annotated[Path, typer.Option(help="Where the trace goes; open it in ui.perfetto.dev.")] = Path("trace.json"),
    png: Annotated[Path | None, typer.Option(help="Draw it too (needs matplotlib).")] = None,
    model: Model = "smollm2",
    link_gbps: Annotated[float, typer.Option(help="Bandwidth of the emulated link in GB/s.")] = 0.4,
    tokens: Tokens = 2000,
    tile: Tile = None,
    ring: Ring = None,
    resident: Resident = None,
    queries: Queries = 13,
) -> None:
    """Write the time line of one pass: every copy, every tile's attention, every layer."""
    settings = build_settings(None, tile=tile, ring=ring, resident=resident)
    if link_gbps <= 0:
        raise InputError(f"--link-gbps must be greater than 0, not {link_gbps:g}")
    check_folders(out, png)
    from offload_triforce.bench.figures import check_pictures
    from offload_triforce.bench.pipeline import make_subject
    from offload_triforce.bench.timeline import draw, trace_pass, utilisation

    check_pictures(png)
    notes.print(f"{model}: filling {tokens:,} tokens of KV cache", style="dim")
    subject = make_subject(model, tokens, settings)
    try:
        subject.device.gbps = link_gbps
        recorded = trace_pass(subject, queries)
    finally:
        subject.close()
    recorded.write(out)
    typer.echo(f"{out}: {len(recorded.spans()):,} spans, link busy {utilisation(recorded.spans()):.1%} of the time")
    if png is not None:
        draw(recorded, png, f"{model}, {tokens:,} tokens, emulated link of {link_gbps:g} GB/s")
        typer.echo(f"{png}: the picture")
