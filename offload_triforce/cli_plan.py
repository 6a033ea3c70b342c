"""The commands that look before they leap: ``plan`` and ``doctor``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from offload_triforce.cli_common import guarded

if TYPE_CHECKING:
    from offload_triforce.planner.answer import Answer
    from offload_triforce.planner.question import Question


def _list(wanted: bool) -> None:
    """The tables that ``plan`` knows by name."""
    if not wanted:
        return
    from offload_triforce.model.shape import shape_of
    from offload_triforce.planner.cards import CARDS, PAGES
    from offload_triforce.planner.models import MODELS, find_config

    models = _table("model", "10^9 weights", "KV KB/token", "layers", "windowed", "positions")
    for known in MODELS:
        shape = shape_of(find_config(known.name)[1], name=known.name)
        layout, billions = shape.layout, shape.weights.parameters / 1e9
        held = sum(layout.token_bytes(layer) for layer in layout.full) / 1e3
        counts = (len(layout.layers), len(layout.sliding), layout.max_positions)
        models.add_row(known.name, f"{billions:.1f}", f"{held:.0f}", *(f"{count:,}" for count in counts))
    cards = _table("card", "GiB", "memory GB/s", "TFLOPS", "PCIe", "link GB/s")
    for card in CARDS:
        figures = (f"{card.memory_gbps:,.0f}", f"{card.tflops:.0f}", f"{card.generation}.0 x{card.lanes}")
        cards.add_row(f"[link={card.source}]{card.name}[/link]", str(card.gib), *figures, f"{card.link_gbps:g}")
    for table in (models, cards):
        Console().print(table)
    Console().print(f"Cards: figures of {PAGES}, the link assumed; planner/cards.py names each page.", style="dim")
    raise typer.Exit


def _table(first: str, *others: str) -> Table:
    """The first column holds names, the others figures."""
    table = Table(Column(first, no_wrap=True))
    for name in others:
        table.add_column(name, justify="right")
    return table


Size = Annotated[str | None, typer.Option(help="24GB (10^9 bytes) or 24GiB (2^30).")]
Share = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Share of guesses accepted; else assumed.")]


@guarded
def plan(
    model: Annotated[
        str, typer.Option(help="Hub id, known name, folder, config.json or GGUF file; no weights needed.")
    ],
    context: Annotated[str, typer.Option(help="Tokens of prompt and answer: 131072, 128K, 1M.")] = "128K",
    gpu: Annotated[str | None, typer.Option(help='A known card, as "RTX 4090"; by default the one in here.')] = None,
    vram: Size = None,
    link: Annotated[str | None, typer.Option(help="Bandwidth of the link, as 25GB/s.")] = None,
    hbm: Annotated[str | None, typer.Option(help="Bandwidth of the card's memory, as 1008GB/s.")] = None,
    ram: Size = None,
    quantize: Annotated[str | None, typer.Option(help="nf4 or int8 weights (bitsandbytes).")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32: weights and KV cache.")] = "bfloat16",
    draft: Annotated[str, typer.Option(help="A small model, likewise; or ngram, self, none.")] = "ngram",
    budget: Annotated[int | None, typer.Option(help="Tokens in the retrieval cache, per KV head and layer.")] = None,
    gamma: Annotated[int | None, typer.Option(help="Guesses per pass over the full cache.")] = None,
    gamma1: Annotated[int | None, typer.Option(help="Guesses of the draft per step of the retrieval level.")] = None,
    tile: Annotated[int | None, typer.Option(help="Tokens per transfer.")] = None,
    ring: Annotated[int | None, typer.Option(help="Tiles in flight.")] = None,
    resident: Annotated[float | None, typer.Option(help="Share of the KV cache that stays on the device.")] = None,
    acceptance: Share = None,
    draft_acceptance: Share = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    known: Annotated[
        bool, typer.Option("--list", callback=_list, is_eager=True, help="Show the models and cards known by name.")
    ] = False,
) -> None:
    """Will it fit, how fast will it be, and which settings are best. Needs neither a GPU nor weights."""
    given = {"budget": budget, "gamma": gamma, "gamma1": gamma1, "tile": tile, "ring": ring, "resident": resident}
    given = {name: value for name, value in given.items() if value is not None}
    from offload_triforce.planner.answer import answer
    from offload_triforce.planner.machine import find_machine
    from offload_triforce.planner.units import parse_bytes, parse_speed

    machine = find_machine(
        gpu,
        None if vram is None else parse_bytes(vram, "--vram"),
        None if link is None else parse_speed(link, "--link"),
        None if hbm is None else parse_speed(hbm, "--hbm"),
        None if ram is None else parse_bytes(ram, "--ram"),
    )
    question = _question(model, draft, dtype, quantize, context, machine, given, acceptance, draft_acceptance)
    found = answer(question)
    if as_json:
        typer.echo(json.dumps(found.as_dict()))
    else:
        _show(found)


def _question(
    model: str, draft: str, dtype: str, quantize: str | None, context: str, machine: Any, given: dict, *rates: Any
) -> Question:
    from offload_triforce.config import Settings, replace_settings
    from offload_triforce.drafts import BOTH
    from offload_triforce.model.loader import DTYPES, QUANTIZATIONS
    from offload_triforce.model.shape import shape_of
    from offload_triforce.planner.models import find_config
    from offload_triforce.planner.question import Question
    from offload_triforce.planner.units import parse_tokens

    if dtype not in DTYPES:
        from offload_triforce.errors import InputError

        raise InputError(f"unknown dtype {dtype!r}; use {', '.join(DTYPES)}")
    tokens, kind = parse_tokens(context), DTYPES[dtype]
    settings = replace_settings(Settings(), given)
    name, config = find_config(model)
    target = shape_of(config, kind, quantize, name)
    variants = () if quantize else tuple(shape_of(config, kind, other, name) for other in QUANTIZATIONS)
    small, draft = None, draft.removeprefix(BOTH)
    if draft == "self":
        small = target
    elif draft not in ("ngram", "none"):
        small_name, small_config = find_config(draft)
        small, draft = shape_of(small_config, kind, None, small_name), "model"
    return Question(target, tokens, machine, settings, tuple(given), small, draft, *rates, variants=variants)


def _show(found: Answer) -> None:
    from offload_triforce.planner.units import gigabytes

    console, asked = Console(), found.question
    weights = f" ({asked.model.quantize})" if asked.model.quantize else ""
    console.print(f"{asked.model.name}{weights}, {asked.context:,} tokens, on {asked.machine.name}", highlight=False)
    table = Table("what", "where")
    table.add_column("GB", justify="right")
    for where, parts, total, limit in (
        ("card", found.used.device, found.used.vram_bytes, asked.machine.memory),
        ("host", found.used.host, found.used.host_bytes, asked.machine.host),
    ):
        for part, size in parts.items():
            table.add_row(part, where, f"{size / 1e9:.2f}")
        of = "" if limit is None else f" of {limit / 1e9:.2f}"
        table.add_row(f"{where} in all{of}", where, f"{total / 1e9:.2f}", style="bold", end_section=True)
    console.print(table)
    for gap in found.missing:
        console.print(f"does not fit: {gigabytes(gap['bytes'])} of {gap['what']} are missing", style="red")
    if found.missing:
        console.print("what would fit:" if found.suggestions else "nothing near would fit; take a smaller model")
    for other in found.suggestions:
        console.print(f"  {other['option']}  ({other['why']}; for {other['for']})", highlight=False, soft_wrap=True)
    if found.prediction is not None:
        _show_times(console, found)
    for note in (*found.notes, *(f"assumed: {line}" for line in found.assumptions)):
        console.print(note, style="dim", highlight=False, soft_wrap=True)


def _show_times(console: Console, found: Answer) -> None:
    told = found.prediction
    table = _table("predicted", "")
    rows = {
        "prefill, s": f"{told.prefill_s:.1f}",
        "plain decoding, ms per token": f"{told.plain_ms:.0f}",
        "through the hierarchy, ms per token": f"{told.round.ms_per_token:.0f}",
        "tokens per pass": f"{told.round.tokens:.1f}",
        "one pass, s (of which on the link)": f"{told.passing.seconds:.3f} ({told.passing.link:.3f})",
        "drafting per pass, s": f"{told.round.seconds - told.round.pass_s:.3f}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    console.print(f"offload-triforce generate {found.options}", highlight=False, soft_wrap=True)


@guarded
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Say what this machine has and lacks, and measure its link and memory once, for ``plan``."""
    from offload_triforce.doctor import examine

    with Console(stderr=True).status("measuring"):
        report = examine()
    if as_json:
        typer.echo(json.dumps(report))
        return
    table = Table("what", "state", "found", "remedy")
    styles = {"ok": "green", "slow": "yellow", "missing": "red", "note": "dim"}
    for row in report["findings"]:
        table.add_row(row["what"], row["state"], row["found"], row["remedy"] or "", style=styles[row["state"]])
    Console().print(table)
    for line in report["measured_lines"]:
        Console().print(line, highlight=False, soft_wrap=True)
