"""The command ``bench throughput``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from offload_triforce.cli.common import Kept, check_writable, examples, guarded
from offload_triforce.cli.ending import paper, say
from offload_triforce.cli.options import AsJson, NewTokens, Out, Png
from offload_triforce.cli.values import read_tokens
from offload_triforce.machine.units import parse_bytes, parse_speed
from offload_triforce.model.fetch import check_source

EXAMPLES = examples(
    "offload-triforce bench throughput --context 6000 --out out.json",
    'offload-triforce bench throughput --emulate "RTX 4090" --ways plain --ways best',
    "offload-triforce bench throughput --link none --context 6000",
)


@guarded
def throughput(
    model: Annotated[str, typer.Option(help="smollm2, qwen-coder, or a hub id, folder or GGUF file.")] = "smollm2",
    context: Annotated[
        list[str] | None, typer.Option(help="Tokens of text; may be repeated. By default 2000 and 6000.")
    ] = None,
    new_tokens: NewTokens = "48",
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
    link: Annotated[
        str | None,
        typer.Option(help="Cap the link (CUDA) or emulate one (CPU), as 25GB/s; none: the CPU alone, all tasks."),
    ] = None,
    out: Out = None,
    png: Png = None,
    as_json: AsJson = False,
) -> None:
    """Milliseconds per token of several ways to decode the same, against the limit that the link sets."""
    check_writable(png)
    kept = Kept(out)
    contexts = list(dict.fromkeys(read_tokens(length, "--context") for length in context or ()))
    answer = read_tokens(new_tokens, "--new-tokens", 2)
    bare = link is not None and link.strip().lower() == "none"
    speed = None if link is None or bare else parse_speed(link, "--link")
    caps = None if vram is None else parse_bytes(vram, "--vram"), speed, bare
    check_source(model)
    from offload_triforce.bench.contenders import BARE, WAYS
    from offload_triforce.bench.figures import check_pictures
    from offload_triforce.bench.stage import ThroughputQuery
    from offload_triforce.bench.throughput import bench_throughput
    from offload_triforce.bench.throughput_report import draw, lines, tables

    check_pictures(png)
    chosen = ways or (BARE if bare else WAYS)
    asked = ThroughputQuery(model, contexts, answer, list(dict.fromkeys(chosen)), emulate, *caps)
    report = bench_throughput(asked, say, kept)
    if as_json:
        typer.echo(json.dumps(report))
    else:
        for table in tables(report):
            paper().print(table)
        for line in lines(report):
            paper().print(line, style="dim", highlight=False, soft_wrap=True)
    kept.close(report, shown=as_json)
    if png is not None:
        draw(report, png)
