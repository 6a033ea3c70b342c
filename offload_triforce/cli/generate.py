"""The command ``generate``: what is asked for is checked, then handed to the engine."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from offload_triforce.cli.answering import Question, Sink, answer
from offload_triforce.cli.common import examples, guarded
from offload_triforce.cli.ending import loading, say
from offload_triforce.cli.kept_session import KeptSession
from offload_triforce.cli.options import (
    AsJson,
    Config,
    Device,
    Draft,
    Dtype,
    MinP,
    Model,
    Quantize,
    QuantizeHead,
    RepetitionPenalty,
    Seed,
    Temperature,
    TopK,
    TopP,
)
from offload_triforce.cli.settings import build_settings, takes_settings
from offload_triforce.cli.sources import find_models, say_unpacked
from offload_triforce.cli.values import check_finite, check_temperatures, read_tokens
from offload_triforce.errors import InputError
from offload_triforce.model.packing import check_packing

EXAMPLES = examples(
    'offload-triforce generate --model ./model --prompt-file book.txt --ask "Who?"',
    'cat notes.txt | offload-triforce generate --model m.gguf --ask "Summarise."',
    "offload-triforce generate --model m.gguf --raw --prompt 'def fibonacci(n):' -v",
    "offload-triforce generate --model m.gguf --prompt-file a.txt --output b.txt",
    "offload-triforce generate --model m.gguf --prompt-file a.txt --session a",
    "offload-triforce generate --model m --prompt-file a --ask 'Who?' --ask 'Why?'",
)
EMPTY = "the prompt is empty; give --prompt-file, --prompt or --ask, or pipe a text in"
PATIENCE = 2.0  # seconds, before somebody is told that standard input is being read
PROMPT = {"rich_help_panel": "Prompt and answer"}


@guarded
@takes_settings()
def generate(
    *,
    model: Model,
    draft: Draft = "auto",
    prompt: Annotated[str | None, typer.Option(help="The prompt itself.", **PROMPT)] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option(help="A UTF-8 text file; - is standard input, which is read anyway if it is piped in.", **PROMPT),
    ] = None,
    ask: Annotated[
        list[str] | None,
        typer.Option(
            help="A question about it, put after the text. May be repeated: each is answered by itself, and what was "
            "read is not read again.",
            **PROMPT,
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="Instructions that come first, in the chat format.", **PROMPT)] = (
        None
    ),
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Ask in the model's chat format, or continue the text without it; by default it is used if there is "
            "one.",
            show_default=False,
            **PROMPT,
        ),
    ] = None,
    output: Annotated[str | None, typer.Option(help="The answer goes to this file.", **PROMPT)] = None,
    max_new_tokens: Annotated[str, typer.Option(help="Limit of the answer.", **PROMPT)] = "256",
    stop: Annotated[list[str] | None, typer.Option(help="Stop after this text; may be repeated.", **PROMPT)] = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    session: Annotated[
        str | None,
        typer.Option(help="Go on with the session of that name, or begin it: what both texts begin with is not read."),
    ] = None,
    seed: Seed = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
    quantize_head: QuantizeHead = None,
    config: Config = None,
    as_json: AsJson = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="The whole report at the end.")] = False,
    given: dict[str, Any],
) -> None:
    """Answer questions about a text, or continue it."""
    settings = build_settings(given, config)
    new_tokens = read_tokens(max_new_tokens, "--max-new-tokens")
    check_temperatures(temperature)
    check_finite(top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty)
    asks = ask or [None]
    _check_words(stop, prompt, asks, system, chat is False)
    sink = Sink(output, as_json, prompt_file, several=len(asks) > 1)
    check_packing(quantize, quantize_head)
    kept = None if session is None else KeptSession(session)
    source, small = find_models(model, draft)
    text = _text(prompt, prompt_file, all((question or "").strip() for question in asks))
    from offload_triforce.engine import TriForce
    from offload_triforce.generation.prompt import build_prompt

    say_unpacked(source, dtype, device, quantize)
    with loading(model):
        engine = TriForce.load(source, small, dtype, device, quantize, settings, quantize_head)
    if kept is not None:
        kept.open(engine)
    how = {"system": system, "raw": chat is False, "chat": chat is True}
    questions = [Question(each, build_prompt(engine.tokenizer, text, each, **how)) for each in asks]
    sampling = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p or None,
        "repetition_penalty": repetition_penalty,
        "max_new_tokens": new_tokens,
    }
    answer(engine, questions, seed, sink, verbose, sampling | ({"stop_strings": stop} if stop else {}), kept)


def _check_words(
    stop: list[str] | None, prompt: str | None, asks: Sequence[str | None], system: str | None, raw: bool
) -> None:
    """What is written on the command line itself."""
    from offload_triforce.generation.prompt import check_text

    for name, words in (("--prompt", prompt), *(("--ask", ask) for ask in asks), ("--system", system)):
        check_text(name, words)
    for words in stop or ():
        check_text("--stop", words)
    if len(asks) > 1 and not all((ask or "").strip() for ask in asks):
        raise InputError("one --ask of several is empty; leave it out, or ask something")
    if any(not words for words in stop or ()):
        raise InputError("--stop is empty: it would end every answer before it begins; leave it out or name a text")
    if raw and system is not None:
        raise InputError("--system and --raw exclude each other: system instructions need the chat format")


def _text(prompt: str | None, prompt_file: str | None, asked: bool) -> str | None:
    """The text that is ``asked`` about or continued; what is piped in needs no option.

    Raises:
        InputError: two texts, or neither text nor question.
    """
    from offload_triforce.generation.prompt import read_text

    if prompt is not None and prompt_file is not None:
        raise InputError("--prompt and --prompt-file exclude each other; give one of them")
    if prompt is not None:
        if not prompt.strip() and not asked:
            raise InputError(EMPTY)
        return prompt
    if prompt_file not in (None, "-"):
        return read_text(prompt_file)
    piped = sys.stdin is not None and not sys.stdin.isatty()
    text = _standard_input(asked=prompt_file == "-") if piped or prompt_file == "-" else ""
    if not text and not asked:
        raise InputError(EMPTY)
    return text or None


def _standard_input(asked: bool) -> str:
    """What is piped in; it may be nothing unless it was ``asked`` for. Who leaves it open is told what is awaited."""
    from offload_triforce.generation.prompt import read_text

    awaited = threading.Timer(PATIENCE, say, ["reading the prompt from standard input, up to its end"])
    awaited.daemon = True
    awaited.start()
    try:
        return read_text("-", blank=not asked)
    finally:
        awaited.cancel()
