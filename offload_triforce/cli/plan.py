"""The command ``plan``, which looks before it leaps."""

from __future__ import annotations

import json
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table
from rich.text import Text

from offload_triforce.cli.common import examples, guarded
from offload_triforce.cli.ending import paper
from offload_triforce.cli.options import AsJson, Quantize, QuantizeHead
from offload_triforce.cli.settings import takes_settings
from offload_triforce.errors import InputError, UnsupportedModelError
from offload_triforce.machine.packages import reads_mtp_heads
from offload_triforce.machine.units import parse_bytes, parse_speed
from offload_triforce.model.fetch import check_source, draft_model

if TYPE_CHECKING:
    from offload_triforce.model.outline import ModelShape
    from offload_triforce.planner.query import PlanQuery
    from offload_triforce.planner.report import PlanReport


def _list(wanted: bool) -> None:
    """The tables that ``plan`` knows by name."""
    if not wanted:
        return
    from offload_triforce.cli.models import table_of_models
    from offload_triforce.machine.cards import CARDS, PAGES

    cards = _table("card", "GiB", "memory GB/s", "TFLOPS", "PCIe", "link GB/s")
    for card in CARDS:
        figures = (f"{card.memory_gbps:,.0f}", f"{card.tflops:.0f}", f"{card.generation}.0 x{card.lanes}")
        cards.add_row(Text(card.name, f"link {card.source}"), str(card.gib), *figures, f"{card.link_gbps:g}")
    paper().print(table_of_models())
    paper().print(cards)
    paper().print(f"Cards: figures of {PAGES}, the link assumed; machine/cards.py names each page.", style="dim")
    raise typer.Exit


def _table(first: str, *others: str) -> Table:
    """The first column holds names, the others figures."""
    table = Table(Column(first, no_wrap=True))
    for name in others:
        table.add_column(name, justify="right")
    return table


Size = Annotated[str | None, typer.Option(help="24GB (10^9 bytes) or 24GiB (2^30).")]
EXAMPLES = examples(
    'offload-triforce plan --model qwen3-8b --context 128K --gpu "RTX 4090"',
    "offload-triforce plan --model ./model --vram 24GB --ram 64GB --quantize nf4",
    "offload-triforce plan --list",
)
Share = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Share of draft tokens accepted; else assumed.")]
First = Annotated[
    float | None,
    typer.Option(min=0.0, max=1.0, help="Share of places where the target takes level 1's first choice; else assumed."),
]


@guarded
@takes_settings(
    "budget", "gamma", "gamma1", "tile", "ring", "resident", "prefill_resident", "hidden_states", "embeddings", "wire"
)
def plan(
    *,
    model: Annotated[
        str,
        typer.Option(help="A name that `models` lists, a hub id, folder, config.json or GGUF file; no weights needed."),
    ],
    context: Annotated[str, typer.Option(help="Tokens of prompt and answer: 131072, 128K, 1M.")] = "128K",
    gpu: Annotated[str | None, typer.Option(help='A known card, as "RTX 4090"; by default the one in here.')] = None,
    vram: Size = None,
    link: Annotated[str | None, typer.Option(help="Bandwidth of the link, as 25GB/s.")] = None,
    hbm: Annotated[str | None, typer.Option(help="Bandwidth of the card's memory, as 1008GB/s.")] = None,
    ram: Size = None,
    quantize: Quantize = None,
    quantize_head: QuantizeHead = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32: weights and KV cache.")] = "bfloat16",
    draft: Annotated[str, typer.Option(help="A small model, likewise; or auto, ngram, mtp, self, none.")] = "auto",
    acceptance: First = None,
    draft_acceptance: Share = None,
    as_json: AsJson = False,
    known: Annotated[
        bool, typer.Option("--list", callback=_list, is_eager=True, help="Show the models and cards known by name.")
    ] = False,
    given: dict[str, Any],
) -> None:
    """Will it fit, how fast will it be, and which settings are best. Needs neither a GPU nor weights."""
    for name in filter(None, (model, draft_model(draft))):
        check_source(name, weights=False)  # before torch is imported, so that a no comes soon
    from offload_triforce.machine.hardware import find_machine
    from offload_triforce.planner.report import make_report

    machine = find_machine(
        gpu,
        None if vram is None else parse_bytes(vram, "--vram"),
        None if link is None else parse_speed(link, "--link"),
        None if hbm is None else parse_speed(hbm, "--hbm"),
        None if ram is None else parse_bytes(ram, "--ram"),
    )
    packing = quantize, quantize_head
    question = _question(model, draft, dtype, packing, context, machine, given, acceptance, draft_acceptance)
    found = make_report(question)
    if as_json:
        from offload_triforce.planner.wording import as_dict

        typer.echo(json.dumps(as_dict(found)))
    else:
        _show(found)


def _question(
    model: str,
    draft: str,
    dtype: str,
    packing: tuple[str | None, str | None],
    context: str,
    machine: Any,
    given: dict,
    *rates: Any,
) -> PlanQuery:
    from offload_triforce.config import Settings, replace_settings
    from offload_triforce.model.weights import DTYPES
    from offload_triforce.planner.drafting import choose_draft
    from offload_triforce.planner.models import find_shape, on_card
    from offload_triforce.planner.query import PlanQuery

    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; use {', '.join(DTYPES)}")
    kind = DTYPES[dtype]
    tokens = Settings.from_mapping({"context": context}).context
    settings = replace_settings(Settings(), given)
    target = on_card(find_shape(model, kind), machine).quantized(*packing)
    variants = _variants(target, packing)
    named = draft_model(draft)
    small, word = (
        (on_card(find_shape(named, kind), machine), "model") if named is not None else _own_draft(draft, target)
    )
    names = {"source": model, "draft_source": draft}
    asked = PlanQuery(target, tokens, machine, settings, tuple(given), small, word, *rates, variants=variants, **names)
    return choose_draft(asked) if draft == "auto" else asked


def _own_draft(draft: str, target: ModelShape) -> tuple[ModelShape | None, str]:
    """What a word means for a target: the shape of what drafts, if it takes memory, and its kind.

    Raises:
        UnsupportedModelError: the target has no MTP head.
    """
    words = draft.split("+")
    if "self" in words:
        return target, "self"
    if not {"mtp", "auto"} & set(words):
        return None, words[0]
    head = target.mtp_head if reads_mtp_heads() else None
    if head is None and "mtp" in words:
        needed = "" if reads_mtp_heads() else f" that transformers {version('transformers')} reads"
        raise UnsupportedModelError(f"{target.name} has no MTP head{needed}; take --draft ngram, or another model")
    return head, "ngram" if head is None else "mtp"


def _variants(target: ModelShape, packing: tuple[str | None, str | None]) -> tuple[ModelShape, ...]:
    """The same model packed in all ways that leave what was asked for; none where its files hold it packed."""
    if target.packed is not None:
        return ()
    from offload_triforce.model.counts import HEAD_QUANTIZATIONS, QUANTIZATIONS

    weights = (packing[0],) if packing[0] else (None, *QUANTIZATIONS)
    heads = (packing[1],) if packing[1] or target.counts.tied else (None, *HEAD_QUANTIZATIONS)
    return tuple(target.quantized(way, head) for head in heads for way in weights if (way, head) != packing)


def _show(found: PlanReport) -> None:
    from offload_triforce.planner import wording as report

    console, asked = paper(), found.question
    say = partial(console.print, highlight=False, soft_wrap=True)
    say(report.verdict(found), style="red" if found.missing else "bold")
    for note in report.notes(found):
        say(note)
    packed = [asked.model.quantize, asked.model.quantize_head and f"{asked.model.quantize_head} head"]
    weights = f" ({', '.join(filter(None, packed))})" if any(packed) else ""
    say(f"\n{asked.model.name}{weights}, {asked.context:,} tokens, on {asked.machine.name}")
    console.print(_footprint(found))
    for other in found.suggestions:
        say(f"would fit: {other['option']}  ({other['why']}; for {other['for']})")
    if found.prediction is not None:
        console.print(_times(found))
        if report.is_accepted(found):
            say(report.command(found))
    for line in found.assumptions:
        say(f"assumed: {line}", style="dim")


def _footprint(found: PlanReport) -> Table:
    table, used, machine = Table("what", "where"), found.used, found.question.machine
    table.add_column("GB", justify="right")
    for where, parts, loading, total, limit in (
        ("card", used.device, used.loading.device, used.vram_bytes, machine.memory),
        ("host", used.host, used.loading.host, used.host_bytes, machine.host),
    ):
        for part, size in parts.items():
            table.add_row(part, where, f"{size / 1e9:.2f}")
        if where == "card":
            table.add_row("while the prompt is read", where, f"{used.prefill_bytes / 1e9:.2f}", style="dim")
            table.add_row("while decoding", where, f"{used.decoding_bytes / 1e9:.2f}", style="dim")
        if loading == total > 0:
            table.add_row("before that, while loading", where, f"{loading / 1e9:.2f}", style="dim")
        of = "" if limit is None else f" of {limit / 1e9:.2f}"
        table.add_row(f"{where} at most{of}", where, f"{total / 1e9:.2f}", style="bold", end_section=True)
    return table


def _times(found: PlanReport) -> Table:
    told, drafts = found.prediction, found.drafting
    table = _table("predicted", "")
    rows = {"prefill, s": f"{told.prefill_s:.1f}"}
    if not found.plain.missing:
        rows["plain decoding, ms per token"] = f"{told.plain_ms:.0f}"
    if drafts is not None:
        rows |= {
            "through the hierarchy, ms per token": f"{drafts.round.ms_per_token:.0f}",
            "tokens per pass": f"{drafts.round.tokens:.1f}",
            "one pass, s (of which on the link)": f"{drafts.passing.seconds:.3f} ({drafts.passing.link:.3f})",
            "drafting per pass, s (and hidden by it)": f"{drafts.round.seconds - drafts.round.pass_s:.3f} "
            f"({drafts.round.hidden * (drafts.round.step_s + drafts.round.draft_s):.3f})",
        }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
