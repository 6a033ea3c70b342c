"""The command ``bench pipeline``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from offload_triforce.cli.common import examples, guarded
from offload_triforce.cli.ending import paper, say
from offload_triforce.cli.options import LEAST_TEXT, AsJson, Queries, TextTokens
from offload_triforce.cli.settings import build_settings, takes_settings
from offload_triforce.cli.values import read_speed, read_tokens
from offload_triforce.errors import InputError
from offload_triforce.model.fetch import check_source

EXAMPLES = examples("offload-triforce bench pipeline --model smollm2 --link-gbps 0.1 --json")


@guarded
@takes_settings("tile", "ring", "resident", "wire")
def pipeline(
    *,
    model: Annotated[list[str] | None, typer.Option(help="May be repeated; smollm2, llama-1b and hybrid-1b.")] = None,
    link_gbps: Annotated[
        list[str] | None,
        typer.Option(help="Bandwidth in GB/s; may be repeated. By default three at which the link dominates."),
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="May be repeated; float32 and bfloat16, by default both.")
    ] = None,
    tokens: TextTokens = "6000",
    repeats: Annotated[int, typer.Option(min=1, help="Passes per row; the median counts.")] = 5,
    queries: Queries = 13,
    as_json: AsJson = False,
    given: dict[str, Any],
) -> None:
    """Time passes against the time that their bytes take on the link alone (emulated, without a GPU)."""
    settings = build_settings(given)
    length = read_tokens(tokens, "--tokens", LEAST_TEXT)
    speeds = [read_speed(text, "--link-gbps") for text in link_gbps or ()]
    if "smollm2" in (model or ["smollm2"]):
        check_source("smollm2")
    from offload_triforce.bench.pipeline import DTYPES, MODELS, bench_pipeline

    for name in dtype or ():
        if name not in DTYPES:
            raise InputError(f"--dtype must be float32 or bfloat16, not {name!r}")
    dtypes = dtype or (("bfloat16",) if settings.wire == "coded" else DTYPES)
    report = bench_pipeline(model or list(MODELS), settings, length, queries, repeats, speeds or None, say, dtypes)
    if as_json:
        typer.echo(json.dumps(report))
        return
    table = Table()
    names = ("model", "dtype", "link GB/s", "pass MB", "raw / wire", "bytes / link, s", "pass, s", "pass / link")
    for name in (*names, "bytes / needed"):
        table.add_column(name, justify="left" if name in ("model", "dtype") else "right")
    for row in report["results"]:
        table.add_row(*_cells(row))
    paper().print(table)


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [row["model"], row["dtype"], f"{row['gbps']:g}", f"{row['pass_bytes'] / 1e6:.1f}"]
    cells += [f"{row['wire_ratio']:.2f}", f"{row['link_s']:.3f}"]
    return [*cells, f"{row['pass_s']:.3f}", f"{row['pass_over_link']:.3f}", f"{row['bytes_over_needed']:.3f}"]
