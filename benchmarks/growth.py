"""How trees should grow: answers recorded once, and replayed with other settings in seconds, without a model.

python -m benchmarks.growth record FOLDER --task explain --temperature 0.6 --seeds 3
python -m benchmarks.growth replay FOLDER --way "width=16 draft_tokens=512" --way "width=32 draft_tokens=1024"
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from offload_triforce.bench.speculation import DRAFT_COST, SHARE, TEMPERATURES
from offload_triforce.bench.tasks import TASKS, find_task
from offload_triforce.cli.common import guarded
from offload_triforce.cli.ending import paper, say
from offload_triforce.cli.options import AsJson
from offload_triforce.cli.values import read_tokens
from offload_triforce.config import Settings, replace_settings
from offload_triforce.errors import InputError

if TYPE_CHECKING:
    from benchmarks.growth_replay import Replayed

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False, no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="Where recorded answers lie, one file each.")]


@app.command()
@guarded
def record(
    folder: Folder,
    model: Annotated[str, typer.Option(help="smollm2, qwen-coder, or any other.")] = "smollm2",
    tokens: Annotated[str, typer.Option(help="Length of the prompts.")] = "3000",
    new_tokens: Annotated[str, typer.Option(help="Of each answer.")] = "112",
    share: Annotated[int, typer.Option(min=1, help="The budget is this part of the prompt, in 16 bits.")] = SHARE,
    task: Annotated[list[str], typer.Option(help="May be given several times.")] = [each.name for each in TASKS],  # noqa: B006
    temperature: Annotated[list[float], typer.Option(min=0)] = list(TEMPERATURES),  # noqa: B006
    seeds: Annotated[int, typer.Option(min=1, help="Answers to each text at a temperature; 0 has one.")] = 2,
) -> None:
    """Let a model answer, and record what level 1 offers. What the folder holds already is left out."""
    from benchmarks.growth_record import file_name, record_answer
    from offload_triforce.engine import TriForce
    from offload_triforce.model.fetch import find_source

    length, new = read_tokens(tokens, "--tokens"), read_tokens(new_tokens, "--new-tokens")
    tasks = [find_task(name) for name in task]
    folder.mkdir(parents=True, exist_ok=True)
    engine = TriForce.load(find_source(model), "ngram", dtype="float32", context=length + new)
    for seed in range(1, seeds + 1):
        for asked in tasks:
            for warmth in temperature:
                if (folder / file_name(asked.name, warmth, seed)).exists() or (seed > 1 and warmth == 0):
                    continue
                say(f"{asked.name} at {warmth:g}, seed {seed}")
                record_answer(engine, asked, warmth, seed, length, new, share).save(folder)


@app.command()
@guarded
def replay(
    folder: Folder,
    way: Annotated[list[str], typer.Option(help='Settings that differ, as "width=16 draft_tokens=512".')] = [],  # noqa: B006
    cost: Annotated[float, typer.Option(help="What a step of level 1 costs, in passes.")] = DRAFT_COST,
    as_json: AsJson = False,
) -> None:
    """Replay recorded answers with the default settings, and with each way: tokens per pass, and per time of a pass."""
    from benchmarks.growth_record import load_records
    from benchmarks.growth_replay import replay_all

    records = load_records(folder)
    if not records:
        raise InputError(f"{folder} holds no recorded answers; make some with `python -m benchmarks.growth record`")
    base = Settings(draft_cost=cost)
    ways = {"default": base} | {text: replace_settings(base, _read(text)) for text in way}
    rows: dict[str, Replayed] = {}
    for name, settings in ways.items():
        say(f"{name}: {len(records)} answers")
        rows[name] = replay_all(records, settings)
    if as_json:
        typer.echo(json.dumps([_figures(name, row, rows["default"]) for name, row in rows.items()]))
    else:
        paper().print(_table(rows, len(records)))


def _read(text: str) -> dict[str, Any]:
    """Settings of a way.

    Raises:
        InputError: one that is not written as name=value, or no number.
    """
    values: dict[str, Any] = {}
    for part in text.split():
        name, equals, value = part.partition("=")
        if not equals or not value.isdecimal():
            raise InputError(f"settings of a way are written as name=number, not as {part!r}")
        values[name] = bool(int(value)) if name in ("adaptive", "overlap") else int(value)
    return values


def _figures(name: str, row: Replayed, base: Replayed) -> dict[str, Any]:
    from benchmarks.growth_replay import ratio

    longer, faster = ratio(row.tokens_per_pass, base.tokens_per_pass), ratio(row.speed, base.speed)
    return {
        "way": name,
        "tokens_per_pass": row.tokens_per_pass,
        "ratio": {"mean": longer[0], "error": longer[1]},
        "speed_ratio": {"mean": faster[0], "error": faster[1]},
        "steps": row.per_pass("steps") - row.per_pass("steps_ahead"),
        "steps_ahead": row.per_pass("steps_ahead"),
        "draft_tokens": row.per_pass("draft_tokens"),
    }


def _table(rows: dict[str, Replayed], answers: int) -> Table:
    table = Table(title=f"{answers} answers", caption="ratios are means over answers, with their standard errors")
    for name in ("way", "tokens/pass", "ratio", "with drafting", "steps", "ahead", "draft tokens"):
        table.add_column(name, justify="left" if name == "way" else "right", no_wrap=name != "way")
    for name, row in rows.items():
        of = _figures(name, row, rows["default"])
        ratios = ["{mean:.3f} ± {error:.3f}".format(**of[which]) for which in ("ratio", "speed_ratio")]
        mean = sum(of["tokens_per_pass"]) / answers
        counts = [f"{of[which]:.1f}" for which in ("steps", "steps_ahead", "draft_tokens")]
        table.add_row(name, f"{mean:.2f}", *ratios, *counts)
    return table


if __name__ == "__main__":
    app()
