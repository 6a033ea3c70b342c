"""Ways to choose what lies in the retrieval cache, compared: attention held, draft tokens accepted.

python -m benchmarks.retrieval [--tokens 4000] [--task question] [--json] [--png FILE]
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from offload_triforce.cli.common import check_writable, guarded
from offload_triforce.cli.ending import paper, say
from offload_triforce.cli.options import LEAST_TEXT, AsJson, Png
from offload_triforce.cli.values import read_tokens
from offload_triforce.model.fetch import check_source


@guarded
def retrieval(
    model: Annotated[str, typer.Option(help="smollm2, qwen-coder, or any other.")] = "smollm2",
    tokens: Annotated[str | None, typer.Option(help="Length of the text that is read first: 6000, 6K.")] = None,
    measure: Annotated[str, typer.Option(help="Tokens after it that are compared; a multiple of 16.")] = "256",
    budget: Annotated[
        str | None, typer.Option(help="Smallest memory, as tokens in 16 bits; by default 1/32 of the text.")
    ] = None,
    task: Annotated[
        str,
        typer.Option(help="continue: the text itself goes on; or explain, edit, question, chat: the model answers."),
    ] = "continue",
    as_json: AsJson = False,
    png: Png = None,
) -> None:
    """Compare ways to choose what lies in the retrieval cache: attention held, draft tokens accepted."""
    check_writable(png)
    check_source(model)
    length = None if tokens is None else read_tokens(tokens, "--tokens", LEAST_TEXT)
    least = None if budget is None else read_tokens(budget, "--budget")
    compared = read_tokens(measure, "--measure", least=0)
    from benchmarks.retrieval_study import bench_retrieval, draw
    from offload_triforce.bench.figures import check_pictures

    check_pictures(png)
    report = bench_retrieval(model, length, compared, least, task, say=say)
    if as_json:
        typer.echo(json.dumps(report))
    else:
        paper().print(_table(report))
    if png is not None:
        draw(report, png)
        say(f"{png}: the picture")


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


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
app.command()(retrieval)

if __name__ == "__main__":
    app()
