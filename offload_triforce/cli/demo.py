"""The command ``demo``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from offload_triforce.cli.common import examples, guarded
from offload_triforce.cli.ending import notes, paper
from offload_triforce.cli.options import AsJson, Device, Seed, Temperature
from offload_triforce.cli.settings import build_settings, takes_settings
from offload_triforce.cli.values import check_temperatures, read_speed, read_tokens
from offload_triforce.model.fetch import check_source

EXAMPLES = examples("offload-triforce demo", "offload-triforce demo --temperature 0.8 --link-gbps 0.1")


@guarded
@takes_settings("gamma", "gamma1", "overlap", "draft_cache", budget="1024")
def demo(
    *,
    draft: Annotated[str, typer.Option(help="auto, ngram, self, ngram+self or none.")] = "auto",
    prompt_tokens: Annotated[str, typer.Option(help="Length of the text, 512 to 8,000.")] = "6000",
    max_new_tokens: Annotated[str, typer.Option(help="Limit of each answer.")] = "64",
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    device: Device = "auto",
    link_gbps: Annotated[str, typer.Option(help="Speed of the emulated link in GB/s; CPU only.")] = "0.2",
    as_json: AsJson = False,
    given: dict[str, Any],
) -> None:
    """Watch it work: SmolLM2 reads 6,000 tokens and answers, plainly and through the hierarchy."""
    check_temperatures(temperature)
    length = read_tokens(prompt_tokens, "--prompt-tokens", 512, 8000)
    new_tokens, gbps = read_tokens(max_new_tokens, "--max-new-tokens"), read_speed(link_gbps, "--link-gbps")
    settings = build_settings(given)
    check_source("smollm2")
    from offload_triforce.cli import report
    from offload_triforce.cli.demonstration import run_demo
    from offload_triforce.config import replace_settings
    from offload_triforce.model.loader import resolve_device

    if resolve_device(device).type == "cpu":
        settings = replace_settings(settings, {"link_gbps": gbps})
    console = notes if as_json else paper()
    runs = run_demo(console, settings, draft, length, new_tokens, temperature, seed, device)
    if as_json:
        typer.echo(json.dumps({name: json.loads(report.as_json(run)) for name, run in runs.items()}))
