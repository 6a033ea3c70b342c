"""The command ``chat``: a conversation with a model, on a terminal or through a pipe."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offload_triforce.cli.common import examples, guarded
from offload_triforce.cli.ending import MISTAKE, loading, notes, say
from offload_triforce.cli.options import (
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
    TopK,
    TopP,
)
from offload_triforce.cli.settings import build_settings, takes_settings
from offload_triforce.cli.sources import find_models, say_unpacked
from offload_triforce.cli.values import check_finite, check_temperatures, read_tokens
from offload_triforce.errors import InputError
from offload_triforce.model.packing import check_packing
from offload_triforce.runtime.session_folder import check_writable, session_path

if TYPE_CHECKING:
    from offload_triforce.cli.chat_loop import Chat
    from offload_triforce.engine import TriForce

EXAMPLES = examples(
    "offload-triforce chat --model smollm2",
    "offload-triforce chat --model ./model --file report.txt --session report",
    "offload-triforce chat --model ./model --system 'Be brief.' --temperature 0.7",
    "cat questions.txt | offload-triforce chat --model m.gguf",
)
TALK = {"rich_help_panel": "Conversation"}


@guarded
@takes_settings()
def chat(
    *,
    model: Model,
    draft: Draft = "auto",
    file: Annotated[
        list[str] | None, typer.Option(help="A document for the first message; may be repeated.", **TALK)
    ] = None,
    system: Annotated[str | None, typer.Option(help="Instructions that come first.", **TALK)] = None,
    session: Annotated[
        str | None, typer.Option(help="A name: go on with that conversation, or begin it and keep it.", **TALK)
    ] = None,
    max_new_tokens: Annotated[str, typer.Option(help="Limit of each answer.", **TALK)] = "2K",
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 is greedy; by default the model's own.", **TALK)
    ] = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
    quantize_head: QuantizeHead = None,
    config: Config = None,
    given: dict[str, Any],
) -> None:
    """Talk with a model. /help lists what can be typed besides questions."""
    settings = build_settings(given, config)
    options = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "max_new_tokens": read_tokens(max_new_tokens, "--max-new-tokens"),
    }
    check_temperatures(*(() if temperature is None else (temperature,)))
    check_finite(top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty)
    if session is not None:
        check_writable(session_path(session))
    _check_streams()
    check_packing(quantize, quantize_head)
    source, small = find_models(model, draft)
    from offload_triforce.engine import TriForce
    from offload_triforce.generation.documents import read_document
    from offload_triforce.generation.prompt import check_text

    check_text("--system", system)
    documents = [read_document(path) for path in file or ()]
    say_unpacked(source, dtype, device, quantize)
    with loading(model):
        engine = TriForce.load(source, small, dtype, device, quantize, settings, quantize_head)
    with engine:
        options = {name: value for name, value in options.items() if value is not None}
        talk = _begin(engine, model, options, seed)
        _open(talk, session, system)
        for document in documents:
            talk.attach(document)
        _converse(talk)


def _check_streams() -> None:
    for stream, name in ((sys.stdin, "input"), (sys.stdout, "output")):
        if stream is None:
            raise InputError(f"standard {name} is closed; a conversation needs it")


def _begin(engine: TriForce, model: str, options: dict[str, Any], seed: int | None) -> Chat:
    """A conversation without messages, on the screen that there is."""
    from offload_triforce.cli.chat_loop import Chat
    from offload_triforce.cli.chat_screen import PlainScreen
    from offload_triforce.cli.chat_store import Store
    from offload_triforce.generation.dialogue import Dialogue

    store = Store(engine, model)
    dialogue = Dialogue(engine, store.session, options=options, seed=seed)
    screen: Any
    if sys.stdin.isatty() and sys.stdout.isatty():
        from offload_triforce.cli.chat_terminal import TerminalScreen, status_line

        screen = TerminalScreen(lambda width: status_line(dialogue, store.name, width))
        say(f"{model}. Enter sends, Alt-Enter begins a new line, /help lists what there is, Ctrl-D leaves.")
    else:
        screen = PlainScreen()
    if dialogue.plain:
        say("this model has no chat template, so the conversation is given to it as lines of User: and Assistant:")
    link = engine.layout.device.type == "cuda" or engine.settings.link_gbps is not None
    return Chat(dialogue, store, screen, link)


def _open(talk: Chat, session: str | None, system: str | None) -> None:
    """Take a kept conversation up, and the instructions.

    Raises:
        InputError: what is kept is damaged or has other instructions; the model's template takes none.
    """
    if session is not None:
        talk.load(session, new=True)
    messages = talk.dialogue.messages
    instructions = [{"role": "system", "content": system}] if system is not None else []
    if messages and instructions and messages[:1] != instructions:
        raise InputError(
            f"the conversation {session} has begun with other instructions; leave --system out, or take another name"
        )
    if not messages and instructions:
        talk.dialogue.ids([*instructions, {"role": "user", "content": "?"}])  # refused before anybody has typed
        talk.dialogue.begin(instructions)


def _converse(talk: Chat) -> None:
    """To its end; then what it has read is kept, if it has a name.

    Raises:
        typer.Exit: through a pipe, there was a mistake.
    """
    talk.run()
    if talk.store.name is not None and talk.dialogue.exchanges:
        with notes.status(f"keeping {talk.store.name}"):
            talk.store.save(None, talk.dialogue.messages)
        say(f"kept as {talk.store.name}; --session {talk.store.name} goes on with it")
    talk.store.close()
    if getattr(talk.screen, "mistakes", 0):
        raise typer.Exit(MISTAKE)
