"""The command ``trace``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from offload_triforce.cli.common import check_writable, examples, guarded
from offload_triforce.cli.ending import say
from offload_triforce.cli.options import LEAST_TEXT, Png, Queries, TextTokens
from offload_triforce.cli.settings import build_settings, takes_settings
from offload_triforce.cli.values import read_speed, read_tokens
from offload_triforce.model.fetch import check_source

Model = Annotated[str, typer.Option(help="smollm2 (real text); llama-1b or hybrid-1b (random weights).")]
EXAMPLES = examples("offload-triforce trace", "offload-triforce trace --out pass.json --png pass.png")


@guarded
@takes_settings("tile", "ring", "resident")
def trace(
    *,
    out: Annotated[Path, typer.Option(help="Where the trace goes; open it in ui.perfetto.dev.")] = Path("trace.json"),
    png: Png = None,
    model: Model = "smollm2",
    link_gbps: Annotated[str, typer.Option(help="Bandwidth of the emulated link in GB/s.")] = "0.4",
    tokens: TextTokens = "2000",
    queries: Queries = 13,
    given: dict[str, Any],
) -> None:
    """Write the time line of one pass: every copy, every tile's attention, every layer."""
    settings = build_settings(given)
    length, gbps = read_tokens(tokens, "--tokens", LEAST_TEXT), read_speed(link_gbps, "--link-gbps")
    check_writable(out, png)
    if model == "smollm2":
        check_source(model)
    from offload_triforce.bench.figures import check_pictures
    from offload_triforce.bench.pipeline import check, make_subject
    from offload_triforce.bench.timeline import draw, trace_pass, utilisation

    check_pictures(png)
    check(model, length, queries, settings)
    say(f"{model}: filling {length:,} tokens of KV cache")
    subject = make_subject(model, length, settings)
    try:
        subject.device.gbps = gbps
        recorded = trace_pass(subject, queries)
    finally:
        subject.close()
    recorded.write(out)
    typer.echo(f"{out}: {len(recorded.spans()):,} spans, link busy {utilisation(recorded.spans()):.1%} of the time")
    if png is not None:
        draw(recorded, png, f"{model}, {length:,} tokens, emulated link of {gbps:g} GB/s")
        typer.echo(f"{png}: the picture")
