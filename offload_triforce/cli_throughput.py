"""The command ``bench throughput``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from offload_triforce.cli_bench import bench
from offload_triforce.cli_common import check_folders, guarded, notes


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
