"""``bench retrieval``: ways to choose what lies in the retrieval cache, compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from offload_triforce.cli_bench import bench
from offload_triforce.cli_common import check_folders, guarded, notes


@bench.command()
@guarded
def retrieval(
    model: Annotated[str, typer.Option(help="smollm2 or qwen-coder.")] = "smollm2",
    tokens: Annotated[int | None, typer.Option(min=512, help="Length of the text that is read first.")] = None,
    measure: Annotated[int, typer.Option(help="Tokens after it that are compared; a multiple of 16.")] = 256,
    budget: Annotated[
        int | None, typer.Option(help="Smallest memory, as tokens in 16 bits; by default 1/32 of the text.")
    ] = None,
    task: Annotated[
        str,
        typer.Option(help="continue: the text itself goes on; or explain, edit, question, chat: the model answers."),
    ] = "continue",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    png: Annotated[Path | None, typer.Option(help="Draw acceptance against memory (needs matplotlib).")] = None,
) -> None:
    """Compare ways to choose what lies in the retrieval cache: attention held, guesses accepted."""
    check_folders(png)
    from offload_triforce.bench.figures import check_pictures
    from offload_triforce.bench.retrieval import bench_retrieval, draw

    check_pictures(png)
    report = bench_retrieval(model, tokens, measure, budget, task, say=_say)
    if png is not None:
        draw(report, png)
        notes.print(f"{png}: the picture", style="dim", markup=False)
    if as_json:
        typer.echo(json.dumps(report))
        return
    Console().print(_table(report))


def _say(line: str) -> None:
    notes.print(line, style="dim", highlight=False)


def _table(report: dict[str, Any]) -> Table:
    """One row per way; acceptance and its change are shown for temperature 0.6."""
    title = f"{report['model']}: {report['measured']} tokens after {report['tokens']:,}"
    table = Table(title=title, caption="change: of acceptance at 0.6 against the default, with its standard error")
    for name in ("way", "tokens", "KB/head", "mass", "T 0.6", "T 1", "change", "greedy", "coupled", "first 4", "chain"):
        table.add_column(name, justify="left" if name == "way" else "right")
    before = None
    for row in report["rows"]:
        if before not in (None, row["about"]):
            table.add_section()
        before = row["about"]
        table.add_row(*_cells(row))
    return table


def _cells(row: dict[str, Any]) -> list[str]:
    accepted, change, chain = row["acceptance"], row["change"]["0.6"], row["chain"]["0.6"]
    name = f"{row['way']} ({row['chunk']} tokens, {row['bits']} bits)" if row["about"] == "default" else row["way"]
    cells = [name, f"{row['tokens']:,}", f"{row['bytes'] / 1e3:.1f}", f"{row['mass']:.3f}"]
    cells += [f"{accepted['0.6']:.3f}", f"{accepted['1']:.3f}"]
    error = "" if change["error"] is None else f" ± {change['error']:.3f}"
    cells.append("" if row["about"] == "default" else f"{change['mean']:+.3f}{error}")
    among = row["among_first"]["1"]
    return [*cells, f"{row['greedy']:.3f}", f"{among[0]:.3f}", f"{among[3]:.3f}", f"{chain:.1f}" if chain else "-"]
