"""What can be typed in a conversation besides what is said: /file, /save, /retry and so on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_triforce.cli import chat_set, report
from offload_triforce.errors import InputError
from offload_triforce.generation.documents import read_document

if TYPE_CHECKING:
    from offload_triforce.cli.chat_loop import Chat

SHOWN = 70  # characters of a question that is shown again
_WORD = re.compile(r"/[A-Za-z?]+")
KEYS = (
    "Enter sends, Alt-Enter (or Esc, Enter) begins a new line, pasted lines stay together; arrow keys bring back what "
    "was typed; Ctrl-C stops an answer, Ctrl-D leaves; a message that begins with / is written with two: //"
)


@dataclass(frozen=True)
class Command:
    """``usage``: its arguments. ``help``: one line. ``run``: with what stands behind it; False ends it all."""

    usage: str
    help: str
    run: Callable[[Chat, str], bool | None]

    @property
    def needs(self) -> bool:
        """Whether it is nothing without an argument."""
        return bool(self.usage) and not self.usage.startswith("[")


def split_command(text: str) -> tuple[str, str] | None:
    """A command and what stands behind it; None if this is something to be said."""
    line = text.strip()
    word, _, rest = line.partition(" ")
    return (word, rest.strip()) if "\n" not in line and _WORD.fullmatch(word) else None


def run_command(chat: Chat, word: str, argument: str) -> bool:
    """Do it; False if the conversation is to end.

    Raises:
        InputError: there is no such command, it lacks something, or it cannot be done.
    """
    command = COMMANDS.get(word.lower())
    if command is None:
        near = difflib.get_close_matches(word.lower(), COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "/help lists what there is"
        raise InputError(f"there is no command {word}; {hint}")
    if command.needs and not argument:
        raise InputError(f"{word.lower()} needs something: {word.lower()} {command.usage}")
    if argument and not command.usage:
        raise InputError(f"{word.lower()} takes nothing behind it, not {argument!r}")
    return command.run(chat, argument) is not False


def _help(chat: Chat, _: str) -> None:
    width = max(len(f"{name} {command.usage}") for name, command in COMMANDS.items())
    for name, command in COMMANDS.items():
        chat.screen.say(f"{f'{name} {command.usage}':<{width}}  {command.help}")
    chat.screen.say(KEYS)


def _file(chat: Chat, path: str) -> None:
    quoted = len(path) > 2 and path[0] == path[-1] and path[0] in "'\""
    chat.attach(read_document(path[1:-1] if quoted else path))


def _save(chat: Chat, name: str) -> None:
    if not chat.dialogue.exchanges:
        raise InputError("nothing has been said yet, so there is nothing to save")
    folder = chat.store.save(name or None, chat.dialogue.messages)
    chat.screen.say(f"saved as {chat.store.name} in {folder}; it is kept from now on, after each answer")


def _load(chat: Chat, name: str) -> None:
    if chat.dialogue.exchanges and chat.store.name is None:
        raise InputError("the present conversation has not been saved; /save NAME keeps it, /clear gives it up")
    chat.load(name)


def _retry(chat: Chat, _: str) -> None:
    chat.answer(chat.dialogue.retry)


def _undo(chat: Chat, _: str) -> None:
    question = chat.dialogue.undo()
    chat.keep()
    chat.screen.say(f"taken back: {short(question)}")


def _clear(chat: Chat, _: str) -> None:
    chat.store.restart(chat.dialogue)
    chat.screen.say("a new conversation")


def _set(chat: Chat, argument: str) -> None:
    if not argument:
        for line in chat_set.shown(chat.dialogue):
            chat.screen.say(line)
        return
    key, _, value = argument.replace("=", " ", 1).partition(" ")
    if not value.strip():
        raise InputError(f"/set {key} needs a value: /set temperature 0.7")
    for line in chat_set.change(chat.dialogue, key, value.strip()):
        chat.screen.say(line)


def _stats(chat: Chat, _: str) -> None:
    dialogue = chat.dialogue
    limit = "" if dialogue.limit is None else f" of {dialogue.limit:,}"
    chat.screen.say(f"{answers(dialogue.exchanges)}, {dialogue.used:,}{limit} tokens of context used")
    if dialogue.stats is None:
        return
    chat.screen.say(f"the latest answer: {dialogue.stats.reused_tokens:,} tokens of the prompt reused")
    for line in report.summary(dialogue.stats, chat.link):
        chat.screen.say(line)


def answers(count: int) -> str:
    """How many, in words."""
    return f"{count:,} answer{'s' * (count != 1)}"


def short(text: str) -> str:
    """The end of a message in one line: of one with documents, that is the question."""
    line = " ".join(text.rsplit("</document>", 1)[-1].split()) or "(documents)"
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 3]}..."


COMMANDS = {
    "/help": Command("", "this list", _help),
    "/file": Command("PATH", "put a document into the next message", _file),
    "/save": Command("[NAME]", "keep the conversation, and what was read", _save),
    "/load": Command("NAME", "go on with a conversation that was kept", _load),
    "/retry": Command("", "answer again, with another seed", _retry),
    "/undo": Command("", "take the last question and its answer back", _undo),
    "/clear": Command("", "begin a new conversation", _clear),
    "/set": Command("[KEY VALUE]", "change how is answered: /set temperature 0.7", _set),
    "/stats": Command("", "what the latest answer took", _stats),
    "/exit": Command("", "leave", lambda chat, _: False),
}
