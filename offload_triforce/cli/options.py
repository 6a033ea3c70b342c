"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SPECULATION = {"rich_help_panel": "Speculation (the defaults find out what pays)"}
Draft = Annotated[
    str,
    typer.Option(help="A small model, likewise; or ngram, self, none. ngram+ before a model: both."),
]
Budget = Annotated[str | None, typer.Option(help="Tokens in the retrieval cache, per KV head and layer: 4096, 4K.")]
Gamma = Annotated[
    int | None, typer.Option(help="Longest path of draft tokens per pass; 0 decodes plainly.", **SPECULATION)
]
Tree = Annotated[int | None, typer.Option(help="Most draft tokens per pass, over all paths.", **SPECULATION)]
Branches = Annotated[int | None, typer.Option(help="Most draft tokens for one place; 1 makes chains.", **SPECULATION)]
Width = Annotated[int | None, typer.Option(help="Draft tokens that a step of level 1 reads at once.", **SPECULATION)]
Bits = Annotated[int | None, typer.Option(help="4, 8 or 16 per number of the retrieval cache.", **SPECULATION)]
Adaptive = Annotated[
    bool | None, typer.Option("--adaptive/--no-adaptive", help="Draft only as far as it pays.", **SPECULATION)
]
Ahead = Annotated[bool | None, typer.Option("--ahead/--no-ahead", help="Draft on while a pass runs.", **SPECULATION)]
Refresh = Annotated[
    bool | None, typer.Option("--refresh/--no-refresh", help="Choose chunks anew in each pass.", **SPECULATION)
]
SamplingRule = Annotated[
    str | None, typer.Option(help="coupled (as plain decoding with this seed) or resampled.", **SPECULATION)
]
Gamma1 = Annotated[int | None, typer.Option(help="Draft tokens of level 0 per step of level 1.", **SPECULATION)]
DraftCache = Annotated[str | None, typer.Option(help="Tokens in the draft model's streaming cache.")]
Tile = Annotated[str | None, typer.Option(help="Tokens per transfer.")]
Ring = Annotated[int | None, typer.Option(help="Tiles in flight: staging buffers on the device.")]
Resident = Annotated[float | None, typer.Option(help="Share of the KV cache that stays on the device, 0 to 1.")]
Device = Annotated[str, typer.Option(help="auto, cuda, cuda:N or cpu.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Of the draws.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Config = Annotated[str | None, typer.Option(help="A JSON file of settings; options win over it.")]
Out = Annotated[Path | None, typer.Option(help="Keep the JSON here, as far as it is.")]
Png = Annotated[Path | None, typer.Option(help="Draw it (needs matplotlib).")]
TextTokens = Annotated[str, typer.Option(help="Length of the text, at least 512: 6000, 6K.")]
NewTokens = Annotated[str, typer.Option(help="Length of each answer.")]
LEAST_TEXT = 512  # tokens; fewer are no test
Queries = Annotated[int, typer.Option(min=1, help="Tokens a pass reads: draft tokens, and the newest of the text.")]
