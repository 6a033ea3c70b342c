"""A conversation on a terminal: lines that can be edited, a history, completion, and a line that says how it goes."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from offload_triforce.cli.chat_commands import COMMANDS
from offload_triforce.cli.chat_screen import PaintedScreen, Painter, styled
from offload_triforce.cli.chat_set import KEYS
from offload_triforce.cli.chat_store import names
from offload_triforce.generation.dialogue import Dialogue
from offload_triforce.machine.folders import history_file


class TerminalScreen(PaintedScreen):
    """See ``Screen``."""

    def __init__(self, status: Callable[[int], str], **options: Any) -> None:
        """``status``: the line at the bottom, for a width. ``options``: of prompt_toolkit, for tests."""
        super().__init__(Painter(sys.stdout, terminal=True, styled=styled(True)))
        self._prompt: PromptSession[str] = PromptSession(
            "> ",
            multiline=True,
            prompt_continuation="  ",
            history=_history(history_file()),
            completer=CommandCompleter(),
            complete_while_typing=True,
            bottom_toolbar=lambda: status(self._prompt.output.get_size().columns),
            key_bindings=_keys(),
            enable_suspend=True,
            **options,
        )

    def read(self) -> str:
        """See ``Screen``."""
        return self._prompt.prompt()

    def answering(self) -> AbstractContextManager[None]:
        """See ``Screen``. What is typed meanwhile is not shown in the middle of the answer, but waits for its end."""
        return _without_echo()


class CommandCompleter(Completer):
    """Completes commands, and what stands behind them: paths, names of conversations, options."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """See prompt_toolkit."""
        text = document.text_before_cursor
        word, space, rest = text.partition(" ")
        if not text.startswith("/") or "\n" in document.text:
            return
        if not space:
            for name, command in COMMANDS.items():
                if name.startswith(word.lower()):
                    yield Completion(name, -len(word), display_meta=command.help)
        elif word == "/file":
            yield from self._paths.get_completions(Document(rest, len(rest)), complete_event)
        elif word in ("/load", "/save", "/set"):
            for name in KEYS if word == "/set" else names():
                if name.startswith(rest):
                    yield Completion(name, -len(rest))


def status_line(dialogue: Dialogue, name: str | None, width: int) -> str:
    """How the conversation goes, as far as it fits into ``width`` columns; what matters most comes first."""
    limit = "" if dialogue.limit is None else f" of {dialogue.limit:,}"
    parts = [f"{dialogue.used:,}{limit} tokens used"]
    if dialogue.documents:
        parts.append(f"{len(dialogue.documents)} file{'s' * (len(dialogue.documents) > 1)} for the next message")
    if (stats := dialogue.stats) is not None:
        speed = 1e3 / stats.ms_per_token if stats.ms_per_token else 0.0
        parts += [
            f"{stats.reused_tokens:,} reused",
            f"{stats.tokens_per_pass:.1f} tokens per pass",
            f"{speed:.1f} tok/s",
        ]
    parts.append("/help" if name is None else name)
    line = ""
    for part in parts:
        longer = f"{line} | {part}" if line else f" {part}"
        if len(longer) > width:
            break
        line = longer
    return line


def _history(path: Path) -> History:
    """In a file that nobody else can read; in memory where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(path)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.complete_state is not None and buffer.complete_state.current_completion is not None:
            buffer.complete_state = None  # it is taken
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    return keys


@contextlib.contextmanager
def _without_echo() -> Iterator[None]:
    import termios

    try:
        terminal = sys.stdin.fileno()
        before = termios.tcgetattr(terminal)
    except (OSError, ValueError, termios.error):
        yield
        return
    quiet = list(before)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
