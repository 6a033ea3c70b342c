"""The planner's tables in docs/choosing.md: what `plan` says of well-known models on four cards, made in one go.

    python -m benchmarks.plan_table            # prints them
    python -m benchmarks.plan_table --write    # puts them into docs/choosing.md

Each cell is what one `offload-triforce plan --json` says, weights in 16 bits where they fit, else packed as little as
will do: int8, nf4, nf4 with an int8 head. Host memory is taken to be plenty, and told. Nothing here is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from typer.testing import CliRunner

from offload_triforce import cli
from offload_triforce.model.names import find_known

PAGE = Path(__file__).parent.parent / "docs/choosing.md"
CARDS = ("RTX 3090", "RTX 4090", "RTX 5070 Ti", "RTX 5090")
PACKINGS = {
    "16 bits": (),
    "int8": ("--quantize", "int8"),
    "nf4": ("--quantize", "nf4"),
    "nf4, int8 head": ("--quantize", "nf4", "--quantize-head", "int8"),
}
PAPER = {"llama-2-7b-128k": ("128K",), "llama-3.1-8b": ("128K",), "qwen2.5-7b-1m": ("128K", "512K", "1M")}
NEWER = {
    "qwen3.6-27b": ("128K", "256K"),
    "qwen3.6-35b-a3b": ("128K", "256K"),
    "gpt-oss-20b": ("128K",),
    "mistral-small-3.2": ("128K",),
    "devstral-small": ("128K",),
    "gemma-4-31b": ("128K", "256K"),
}
BEGIN, END = "<!-- {}: made by `python -m benchmarks.plan_table --write` -->", "<!-- end of {} -->"

Plan = Callable[[Sequence[str]], dict[str, Any] | None]


class Cell(NamedTuple):
    """What is planned: a model, packed in that way, on a card."""

    model: str
    context: str
    card: str


def ask(options: Sequence[str]) -> dict[str, Any] | None:
    """What the command `plan` says; None where it refuses the question."""
    done = CliRunner().invoke(cli.app, ["plan", "--json", *options])
    return json.loads(done.stdout) if done.exit_code == 0 else None


def describe(cell: Cell, plan: Plan = ask) -> str:
    """A cell of the table: "ms/token (plain), tokens per pass, host memory", and how the weights are packed."""
    for packing, options in PACKINGS.items():
        given = ("--model", cell.model, "--context", cell.context, "--gpu", cell.card, *options)
        if (told := plan(given)) is None or not told["fits"]:
            continue
        host = f"{told['host_bytes'] / 1e9:,.0f} GB"
        packed = "" if packing == "16 bits" else f"{packing}: "
        plain = told["ms_per_token_plain"]
        if told["way"] == "plain":
            return f"{packed}{plain:,.0f} plain, {host}"
        beside = "" if plain is None else f" ({plain:,.0f})"
        return f"{packed}**{told['ms_per_token']:,.0f}**{beside}, {told['tokens_per_pass']:.0f} a pass, {host}"
    return "does not fit"


def table(models: dict[str, Sequence[str]], say: Callable[[str], None], plan: Plan = ask) -> str:
    """Markdown: a row for each model that is known by name and length of text, a column for each card."""
    lines = [f"| model, tokens | {' | '.join(CARDS)} |", "|---" * (len(CARDS) + 1) + "|"]
    for name, contexts in models.items():
        if (known := find_known(name)) is None:
            say(f"{name} is not known by name: left out")
            continue
        for context in contexts:
            say(f"{known.title}, {context}")
            cells = [describe(Cell(name, context, card), plan) for card in CARDS]
            lines.append(f"| {known.title}, {context} | {' | '.join(cells)} |")
    return "\n".join(lines)


def replaced(page: str, tables: dict[str, str]) -> str:
    """The page with its tables made anew, each between two marks that name it.

    Raises:
        ValueError: a mark is missing.
    """
    for name, made in tables.items():
        begin, end = BEGIN.format(name), END.format(name)
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"{PAGE.name} has no table between {begin!r} and {end!r}")
        page = f"{before}{begin}\n\n{made}\n\n{end}{after}"
    return page


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/choosing.md")
    given = parser.parse_args()

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    tables = {"long contexts": table(PAPER, say), "models of 2026": table(NEWER, say)}
    if given.write:
        PAGE.write_text(replaced(PAGE.read_text(), tables))
    else:
        print("\n\n".join(tables.values()))


if __name__ == "__main__":
    main()
