"""The command line. Text goes to standard output; progress and reports go to standard error."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from offload_triforce import cli_bench, cli_plan, cli_retrieval, cli_throughput  # noqa: F401
from offload_triforce._version import __version__
from offload_triforce.cli_common import build_settings, guarded, notes
from offload_triforce.errors import InputError

app = typer.Typer(
    help="Lossless long-context decoding: the KV cache in host memory, TriForce's hierarchical speculation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(cli_bench.bench, name="bench")
app.command()(cli_bench.trace)
app.command()(cli_plan.plan)
app.command()(cli_plan.doctor)


def main() -> None:
    """Entry point."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say it.")] = False,
) -> None:
    """Nothing but options that belong to no command."""


SPECULATION = {"rich_help_panel": "Speculation (the defaults find out what pays)"}
Draft = Annotated[
    str,
    typer.Option(
        help="Hub id, folder or GGUF file of a small model; or ngram, self, none. ngram+ before a model: both."
    ),
]
Budget = Annotated[int | None, typer.Option(help="Tokens in the retrieval cache, per KV head and layer.")]
Gamma = Annotated[int | None, typer.Option(help="Longest path of guesses per pass; 0 decodes plainly.", **SPECULATION)]
Tree = Annotated[int | None, typer.Option(help="Most guesses per pass, over all paths.", **SPECULATION)]
Branches = Annotated[int | None, typer.Option(help="Most guesses for one place; 1 makes chains.", **SPECULATION)]
Width = Annotated[int | None, typer.Option(help="Guesses that a step of level 1 reads at once.", **SPECULATION)]
Bits = Annotated[int | None, typer.Option(help="4, 8 or 16 per number of the retrieval cache.", **SPECULATION)]
Adaptive = Annotated[
    bool | None, typer.Option("--adaptive/--no-adaptive", help="Guess only as far as it pays.", **SPECULATION)
]
Ahead = Annotated[bool | None, typer.Option("--ahead/--no-ahead", help="Guess on while a pass runs.", **SPECULATION)]
Refresh = Annotated[
    bool | None, typer.Option("--refresh/--no-refresh", help="Choose chunks anew in each pass.", **SPECULATION)
]
SamplingRule = Annotated[
    str | None, typer.Option(help="coupled (as plain decoding with this seed) or resampled.", **SPECULATION)
]
Gamma1 = Annotated[int | None, typer.Option(help="Guesses of the draft per step of level 1.", **SPECULATION)]
DraftCache = Annotated[int | None, typer.Option(help="Tokens in the draft model's streaming cache.")]
Tile = Annotated[int | None, typer.Option(help="Tokens per transfer.")]
Resident = Annotated[float | None, typer.Option(help="Share of the KV cache that stays on the device, 0 to 1.")]
Device = Annotated[str, typer.Option(help="auto, cuda, cuda:N or cpu.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Of the draws.")]


@app.command()
@guarded
def generate(
    model: Annotated[str, typer.Option(help="Hub id, local folder or GGUF file of the target.")],
    draft: Draft = "ngram",
    prompt: Annotated[str | None, typer.Option(help="The prompt itself.")] = None,
    prompt_file: Annotated[str | None, typer.Option(help="A UTF-8 text file; - is standard input.")] = None,
    ask: Annotated[str | None, typer.Option(help="A question about it, put after the text.")] = None,
    chat: Annotated[
        bool | None, typer.Option(help="Use the model's chat format; by default, when there is --ask.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Limit of the answer.")] = 256,
    temperature: Temperature = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="1 is off.")] = 1.0,
    min_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="0 is off.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(min=0.01, help="1 is off.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop after this text; may be repeated.")] = None,
    seed: Seed = None,
    context: Annotated[int | None, typer.Option(help="Most tokens of prompt and answer together.")] = None,
    budget: Budget = None,
    gamma: Gamma = None,
    gamma1: Gamma1 = None,
    tree: Tree = None,
    branches: Branches = None,
    width: Width = None,
    bits: Bits = None,
    adaptive: Adaptive = None,
    ahead: Ahead = None,
    refresh: Refresh = None,
    rule: SamplingRule = None,
    draft_cache: DraftCache = None,
    tile: Tile = None,
    ring: Annotated[int | None, typer.Option(help="Tiles in flight: staging buffers on the device.")] = None,
    resident: Resident = None,
    graphs: Annotated[
        bool | None, typer.Option("--graphs/--no-graphs", help="Replay drafting steps as CUDA graphs.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16: weights and KV cache.")] = "auto",
    device: Device = "auto",
    quantize: Annotated[str | None, typer.Option(help="nf4 or int8 weights (bitsandbytes).")] = None,
    link_gbps: Annotated[float | None, typer.Option(help="Emulate a link of this speed; CPU only.")] = None,
    config: Annotated[str | None, typer.Option(help="A JSON file of settings; options win over it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Continue a text, or answer a question about it."""
    settings = build_settings(
        config,
        context=context,
        budget=budget,
        gamma=gamma,
        gamma1=gamma1,
        tree=tree,
        branches=branches,
        width=width,
        bits=bits,
        adaptive=adaptive,
        ahead=ahead,
        refresh=refresh,
        rule=rule,
        draft_cache=draft_cache,
        tile=tile,
        ring=ring,
        resident=resident,
        graphs=graphs,
        link_gbps=link_gbps,
    )
    from offload_triforce.prompt import build_prompt, read_text

    if prompt is not None and prompt_file is not None:
        raise InputError("--prompt and --prompt-file exclude each other; give one of them")
    text = read_text(prompt_file) if prompt_file is not None else prompt
    if not (text or "").strip() and not (ask or "").strip():
        raise InputError("the prompt is empty; give --prompt-file, --prompt or --ask")
    from offload_triforce.engine import TriForce

    with notes.status(f"loading {model}"):
        engine = TriForce.load(model, draft, dtype, device, quantize, settings)
    ids = build_prompt(engine.tokenizer, text, ask, chat=bool(ask) if chat is None else chat)
    sampling = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p or None,
        "repetition_penalty": repetition_penalty,
        "max_new_tokens": max_new_tokens,
    }
    _answer(engine, ids, seed, as_json, sampling | ({"stop_strings": stop} if stop else {}))


def _answer(engine: Any, ids: list[int], seed: int | None, as_json: bool, sampling: dict[str, Any]) -> None:
    """Stream the answer, then the report; an interrupted one is reported as far as it came."""
    from offload_triforce import report

    with engine, report.bars(notes) as (progress, pinning):
        stream = engine.stream(ids, seed=seed, progress=progress, pinning=pinning, **sampling)
        try:
            for piece in stream:
                if not as_json:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
        except KeyboardInterrupt:
            _report(stream.result, as_json)
            raise
        _report(stream.result, as_json)


def _report(result: Any, as_json: bool) -> None:
    from offload_triforce import report

    if as_json:
        typer.echo(report.as_json(result))
        return
    sys.stdout.write("\n")
    sys.stdout.flush()
    for line in report.summary(result.stats):
        notes.print(line, style="dim", highlight=False, soft_wrap=True)


@app.command()
@guarded
def demo(
    draft: Annotated[str, typer.Option(help="ngram, self, ngram+self or none.")] = "ngram",
    prompt_tokens: Annotated[int, typer.Option(min=512, max=8000, help="Length of the text.")] = 6000,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Limit of each answer.")] = 64,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    budget: Budget = 1024,
    gamma: Gamma = None,
    gamma1: Gamma1 = None,
    ahead: Ahead = None,
    draft_cache: DraftCache = None,
    device: Device = "auto",
    link_gbps: Annotated[float, typer.Option(help="Speed of the emulated link in GB/s; CPU only.")] = 0.2,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Watch it work: SmolLM2 reads 6,000 tokens and answers, plainly and through the hierarchy."""
    settings = build_settings(None, budget=budget, gamma=gamma, gamma1=gamma1, ahead=ahead, draft_cache=draft_cache)
    from offload_triforce import report
    from offload_triforce.config import replace_settings
    from offload_triforce.demo import run_demo
    from offload_triforce.model.loader import resolve_device

    if resolve_device(device).type == "cpu":
        settings = replace_settings(settings, {"link_gbps": link_gbps})
    console = notes if as_json else Console()
    runs = run_demo(console, settings, draft, prompt_tokens, max_new_tokens, temperature, seed, device)
    if as_json:
        typer.echo(json.dumps({name: json.loads(report.as_json(run)) for name, run in runs.items()}))


if __name__ == "__main__":
    main()
