"""The command ``bench prediction``: how fast it is, and whether that was to be foreseen."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from offload_triforce.cli.common import Kept, examples, guarded
from offload_triforce.cli.ending import paper, say
from offload_triforce.cli.options import LEAST_TEXT, AsJson, NewTokens, Out, TextTokens
from offload_triforce.cli.values import read_speed, read_tokens
from offload_triforce.model.fetch import check_source

EXAMPLES = examples("offload-triforce bench prediction --tokens 2000 --link-gbps 0.1 --json")


@guarded
def prediction(
    model: Annotated[str, typer.Option(help="smollm2, qwen-coder, or a hub id, folder or GGUF file.")] = "smollm2",
    tokens: TextTokens = "2000",
    new_tokens: NewTokens = "48",
    link_gbps: Annotated[
        list[str] | None,
        typer.Option(
            help="Emulated link in GB/s; may be repeated. By default, passes take 1, 3 and 6 times their computation."
        ),
    ] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Passes and whole answers, predicted by the cost model and measured: the emulated link, or a real one."""
    length, answer = read_tokens(tokens, "--tokens", LEAST_TEXT), read_tokens(new_tokens, "--new-tokens", 8)
    speeds = [read_speed(text, "--link-gbps") for text in link_gbps or ()]
    kept = Kept(out)
    check_source(model)
    from offload_triforce.bench.prediction import bench_prediction

    report = bench_prediction(model, length, answer, speeds or None, say)
    kept(report)
    if as_json:
        typer.echo(json.dumps(report))
    else:
        paper().print(_table(report))
    kept.close(report, shown=as_json)


def _table(report: dict[str, Any]) -> Table:
    table = Table(title=f"{report['model']}, {report['prompt_tokens']:,} tokens, {report['link']} links; ms")
    table.add_column("what", no_wrap=True)
    for name in ("link GB/s", "predicted", "measured", "ratio", "by rates"):
        table.add_column(name, justify="right")
    for row in report["passes"]:
        what = f"pass, {row['queries']} token{'s' * (row['queries'] > 1)}"
        cells = _cells(1e3 * row["predicted"], 1e3 * row["measured"], row["ratio"])
        table.add_row(what, f"{row['gbps']:.3g}", *cells, "")
    for row in report["answers"]:
        alone = row.get("ratio_from_rates")
        cells = _cells(row["predicted"], row["measured"], row["ratio"])
        table.add_row(f"{row['way']}, per token", f"{row['gbps']:.3g}", *cells, "" if alone is None else f"{alone:.3f}")
    return table


def _cells(predicted: float, measured: float, ratio: float) -> list[str]:
    return [f"{predicted:,.1f}", f"{measured:,.1f}", f"{ratio:.3f}"]
