"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Draft = Annotated[
    str,
    typer.Option(help="A small model, likewise; or auto, ngram, mtp, self, none. ngram+ before one of them: both."),
]
Model = Annotated[str, typer.Option(help="A name that models lists, a hub id, a folder or a GGUF file.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16: weights and KV cache.")]
Device = Annotated[str, typer.Option(help="auto, cuda, cuda:N or cpu.")]
Quantize = Annotated[str | None, typer.Option(help="nf4 or int8 weights (bitsandbytes).")]
QuantizeHead = Annotated[
    str | None, typer.Option(help="int8: the output head's weights, which --quantize leaves as they are.")
]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy.")]
TopK = Annotated[int | None, typer.Option(min=0, help="0 is off.")]
TopP = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="1 is off.")]
MinP = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="0 is off.")]
RepetitionPenalty = Annotated[float | None, typer.Option(min=0.01, help="1 is off.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Of the draws.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Config = Annotated[str | None, typer.Option(help="A JSON file of settings; options win over it.")]
Out = Annotated[Path | None, typer.Option(help="Keep the JSON here, as far as it is.")]
Png = Annotated[Path | None, typer.Option(help="Draw it (needs matplotlib).")]
TextTokens = Annotated[str, typer.Option(help="Length of the text, at least 512: 6000, 6K.")]
NewTokens = Annotated[str, typer.Option(help="Length of each answer.")]
LEAST_TEXT = 512  # tokens; fewer are no test
Queries = Annotated[int, typer.Option(min=1, help="Tokens a pass reads: draft tokens, and the newest of the text.")]
