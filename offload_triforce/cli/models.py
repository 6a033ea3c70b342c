"""The command ``models``: the names that all commands know, and which of those models are here."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.table import Column, Table

from offload_triforce.cli.common import examples, guarded
from offload_triforce.cli.ending import paper
from offload_triforce.cli.options import AsJson

EXAMPLES = examples("offload-triforce models", "offload-triforce models --json")
LINES = (
    "KV: of the layers without a window, in 16 bits. `plan` knows all of these without asking the hub.",
    "--model and --draft take these names, and any other hub id, folder or GGUF file.",
)


@guarded
def models(
    as_json: AsJson = False,
) -> None:
    """List the models known by name, and whether they are here."""
    if as_json:
        typer.echo(json.dumps({"models": rows()}))
        return
    paper().print(table_of_models())
    for line in LINES:
        paper().print(line, style="dim", highlight=False)


def rows() -> list[dict[str, Any]]:
    """What is known of each model, for JSON. KV in bytes, in 16 bits, of the layers without a window."""
    from offload_triforce.model.fetch import kept_file
    from offload_triforce.model.hub import has_copy
    from offload_triforce.model.known import PlainConfig
    from offload_triforce.model.names import MODELS
    from offload_triforce.model.outline import LayerShape, layers_of_known

    found = []
    for known in MODELS:
        layers, kept = layers_of_known(known), kept_file(known)
        attending = [layer for layer in layers if isinstance(layer, LayerShape)]
        full = [layer for layer in attending if layer.window is None]
        found.append(
            {
                "name": known.name,
                "hub": known.ids[0],
                "other_ids": list(known.ids[1:]),
                "parameters": known.counts.weights(2, None).parameters,
                "kv_bytes_per_token": sum(layer.token_bytes(2) for layer in full),
                "layers": len(layers),
                "windowed_layers": len(attending) - len(full),
                "positions": PlainConfig(known.config).get_text_config().max_position_embeddings,
                "here": str(kept) if kept else next((other for other in known.ids if has_copy(other)), None),
            }
        )
    return found


def table_of_models() -> Table:
    """The same for people, within 80 columns."""
    names = (Column("name", no_wrap=True), Column("hub id", overflow="fold", min_width=36))  # longer ids go on below
    figures = (Column(name, justify="right") for name in ("10^9\nweights", "KV KB\n/tok.", "posi-\ntions"))
    table = Table(*names, *figures, "here", box=None, padding=(0, 1, 0, 0))
    for row in rows():
        table.add_row(
            row["name"],
            row["hub"],
            f"{row['parameters'] / 1e9:.2f}",
            f"{row['kv_bytes_per_token'] / 1e3:.0f}",
            f"{row['positions'] // 1024}K",
            "yes" if row["here"] else "no",
        )
    return table
