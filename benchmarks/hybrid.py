"""MTP drafts on a hybrid that is trained for it: tokens per pass against TriForce's own setting, with and without.

python -m benchmarks.hybrid [--minutes 8] [--tokens 4096] [--out FILE]
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from offload_triforce.cli.common import check_writable, guarded
from offload_triforce.cli.ending import paper, say
from offload_triforce.cli.options import AsJson
from offload_triforce.cli.values import read_tokens
from offload_triforce.machine.folders import cache_folder


@guarded
def hybrid(
    minutes: Annotated[float, typer.Option(min=0.1, help="Of training, where it has not been done yet.")] = 8.0,
    again: Annotated[bool, typer.Option("--again", help="Train anew, though a model is kept.")] = False,
    tokens: Annotated[str, typer.Option(help="Length of the texts, at least 4096.")] = "4096",
    answer: Annotated[str, typer.Option(help="Tokens of each answer.")] = "96",
    runs: Annotated[int, typer.Option(min=1, help="Answers to each text at a temperature; 0 has one.")] = 2,
    as_json: AsJson = False,
    out: Annotated[Path | None, typer.Option(help="Keep the JSON here.")] = None,
) -> None:
    """Train a small hybrid with an MTP head, and count what its draft tokens save."""
    check_writable(out)
    length, new = read_tokens(tokens, "--tokens", least=4096), read_tokens(answer, "--answer")
    from benchmarks.hybrid_model import train
    from benchmarks.hybrid_study import DEFAULT, bench_hybrid, is_trained

    folder = cache_folder() / "hybrid"
    if again or not is_trained(folder):
        train(folder, minutes, say)
    plan = replace(DEFAULT, tokens=length, new_tokens=new, runs=runs)
    report = bench_hybrid(folder, plan, say)
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")
    if as_json:
        typer.echo(json.dumps(report))
    else:
        paper().print(table(report))


def table(report: dict[str, Any]) -> Table:
    """One row per temperature and way."""
    title = f"{report['plan']['tokens']:,} tokens, answers of {report['plan']['new_tokens']}"
    shown = Table(title=title)
    for name in ("T", "way", "tokens per pass", "steps per pass", "accepted: level 1", "level 0", "by drafter"):
        shown.add_column(name, justify="left" if name in ("way", "by drafter") else "right")
    before = None
    for cell in report["cells"]:
        if before not in (None, cell["temperature"]):
            shown.add_section()
        before = cell["temperature"]
        rates = ", ".join(f"{name} {rate:.0%}" for name, rate in cell["by_drafter"].items())
        figures = [f"{cell['tokens_per_pass']:.2f}", f"{cell['steps_per_pass']:.1f}"]
        figures += ["-" if cell[level] is None else f"{cell[level]:.0%}" for level in ("retrieval", "draft")]
        shown.add_row(f"{cell['temperature']:g}", cell["way"], *figures, rates)
    return shown


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
app.command()(hybrid)

if __name__ == "__main__":
    app()
