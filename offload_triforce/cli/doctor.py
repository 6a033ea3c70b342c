"""The command ``doctor``."""

from __future__ import annotations

import json

import typer
from rich.table import Table

from offload_triforce.cli.common import examples, guarded
from offload_triforce.cli.ending import notes, paper
from offload_triforce.cli.options import AsJson

EXAMPLES = examples("offload-triforce doctor", "offload-triforce doctor --json")


@guarded
def doctor(
    as_json: AsJson = False,
) -> None:
    """Say what this machine has and lacks, and measure its link and memory once, for plan."""
    from offload_triforce.machine.doctor import examine

    with notes.status("measuring"):
        report = examine()
    if as_json:
        typer.echo(json.dumps(report))
        return
    table = Table("what", "state", "found", "remedy")
    styles = {"ok": "green", "slow": "yellow", "missing": "red", "note": "dim"}
    for row in report["findings"]:
        table.add_row(row["what"], row["state"], row["found"], row["remedy"] or "", style=styles[row["state"]])
    paper().print(table)
    for line in report["measured_lines"]:
        paper().print(line, highlight=False, soft_wrap=True)
