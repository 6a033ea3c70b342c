"""The commands ``bench throughput`` and ``bench prediction``: how fast it is, and whether that was to be foreseen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from offload_triforce.cli_bench import bench
from offload_triforce.cli_common import check_folders, guarded, notes
from offload_triforce.errors import InputError


@bench.command()
@guarded
def throughput(
    model: Annotated[str, typer.Option(help="smollm2, qwen-coder, or a hub id, folder or GGUF file.")] = "smollm2",
    context: Annotated[
        list[int] | None, typer.Option(help="Tokens of text; may be repeated. By default 2000 and 6000.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Length of each answer.")] = 48,
    ways: Annotated[
        list[str] | None,
        typer.Option(
            help="May be repeated: plain, triforce, best, transformers-offloaded, transformers-cpu; all by default."
        ),
    ] = None,
    emulate: Annotated[
        str | None, typer.Option(help='A known card, as "RTX 4090": in slow motion, on the CPU, link and all.')
    ] = None,
    vram: Annotated[str | None, typer.Option(help="Cap the device's memory, as 24GB (CUDA).")] = None,
    link: Annotated[str | None, typer.Option(help="Cap the link (CUDA) or emulate one (CPU), as 25GB/s.")] = None,
    out: Annotated[Path | None, typer.Option(help="Keep the JSON here, as far as it is, answer by answer.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw it (needs matplotlib).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Milliseconds per token of several ways to decode the same, against the limit that the link sets."""
    check_folders(out, png)
    from offload_triforce.bench.contenders import WAYS
    from offload_triforce.bench.figures import check_pictures
    from offload_triforce.bench.stage import Question
    from offload_triforce.bench.throughput import bench_throughput
    from offload_triforce.bench.throughput_report import draw, lines, tables
    from offload_triforce.planner.units import parse_bytes, parse_speed

    check_pictures(png)
    asked = Question(
        model,
        list(dict.fromkeys(context or ())),
        new_tokens,
        list(dict.fromkeys(ways or WAYS)),
        emulate,
        None if vram is None else parse_bytes(vram, "--vram"),
        None if link is None else parse_speed(link, "--link"),
    )

    def keep(report: dict[str, Any]) -> None:
        if out is not None:
            out.write_text(json.dumps(report, indent=1))

    report = bench_throughput(asked, lambda line: notes.print(line, style="dim", highlight=False), keep)
    if png is not None:
        draw(report, png)
    if as_json:
        typer.echo(json.dumps(report))
        return
    for table in tables(report):
        Console().print(table)
    for line in lines(report):
        Console().print(line, style="dim", highlight=False, soft_wrap=True)


@bench.command()
@guarded
def prediction(
    model: Annotated[str, typer.Option(help="smollm2, qwen-coder, or a hub id, folder or GGUF file.")] = "smollm2",
    tokens: Annotated[int, typer.Option(min=512, help="Length of the text.")] = 2000,
    new_tokens: Annotated[int, typer.Option(min=8, help="Length of each answer.")] = 48,
    link_gbps: Annotated[
        list[float] | None,
        typer.Option(
            help="Emulated link in GB/s; may be repeated. By default, passes take 1, 3 and 6 times their computation."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Keep the JSON here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Passes and whole answers, predicted by the cost model and measured: the emulated link, or a real one."""
    if link_gbps and min(link_gbps) <= 0:
        raise InputError(f"--link-gbps must be greater than 0, not {min(link_gbps):g}")
    check_folders(out)
    from offload_triforce.bench.prediction import bench_prediction

    report = bench_prediction(
        model, tokens, new_tokens, link_gbps, lambda line: notes.print(line, style="dim", highlight=False)
    )
    if out is not None:
        out.write_text(json.dumps(report, indent=1))
    if as_json:
        typer.echo(json.dumps(report))
        return
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
    Console().print(table)


def _cells(predicted: float, measured: float, ratio: float) -> list[str]:
    return [f"{predicted:,.1f}", f"{measured:,.1f}", f"{ratio:.3f}"]
