"""How a conversation is shown: what all screens have in common, and the one for pipes and files."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol, TextIO

from offload_triforce.cli import report
from offload_triforce.cli.ending import notes, say
from offload_triforce.cli.loading import Loading
from offload_triforce.errors import InputError
from offload_triforce.generation.reply_text import CLOSES, OPENS
from offload_triforce.model.prefill import Progress

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a terminal would obey them, whoever wrote them


class Screen(Protocol):
    """Where a conversation takes place."""

    def read(self) -> str:
        """What is typed next.

        Raises:
            EOFError: nothing more will be. KeyboardInterrupt: Ctrl-C, where nothing was typed.
        """

    def say(self, line: str) -> None:
        """A line of ours."""

    def mistake(self, error: Exception) -> None:
        """One sentence about what could not be done."""

    def piece(self, thought: bool, text: str) -> None:
        """Some of an answer."""

    def finish(self) -> None:
        """The answer is over."""

    def reading(self, loading: Loading) -> AbstractContextManager[tuple[Progress, Progress]]:
        """While a prompt is read: progress of the prefill, and of pinning memory. ``loading``: of a session before."""

    def answering(self) -> AbstractContextManager[None]:
        """While an answer comes."""


class Painter:
    """Writes an answer: thoughts dimmed where that can be, else between their marks."""

    def __init__(self, out: TextIO, terminal: bool, styled: bool) -> None:
        self._out, self._terminal, self._styled = out, terminal, styled
        self._thinking = False
        self._written = ""

    def piece(self, thought: bool, text: str) -> None:
        """See ``Screen``."""
        if self._terminal:
            text = _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)
        if thought != self._thinking:
            self._turn(thought)
        self._written = text or self._written
        self._write(text)

    def finish(self) -> None:
        """See ``Screen``."""
        if self._thinking:
            self._turn(False)
        elif not self._written.endswith("\n"):
            self._write("\n")
        self._written = ""

    def blank(self) -> None:
        """An empty line."""
        self._write("\n")

    def _turn(self, thought: bool) -> None:
        self._thinking = thought
        if self._styled:
            self._write(_DIM if thought else f"{_PLAIN}\n\n")
        else:
            self._write(f"{OPENS}\n" if thought else f"\n{CLOSES}\n\n")
        self._written = "\n"

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def styled(terminal: bool) -> bool:
    """Whether standard output shows dimmed text, and the user wants any such thing."""
    return terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class PaintedScreen:
    """What both screens do alike: answers are painted, and the rest is said as all commands say it."""

    def __init__(self, painter: Painter) -> None:
        self._painter = painter

    def say(self, line: str) -> None:
        """See ``Screen``."""
        say(line)

    def mistake(self, error: Exception) -> None:
        """See ``Screen``."""
        show_mistake(error)

    def piece(self, thought: bool, text: str) -> None:
        """See ``Screen``."""
        self._painter.piece(thought, text)

    def finish(self) -> None:
        """See ``Screen``. An empty line sets the answer apart."""
        self._painter.finish()
        self._painter.blank()

    def reading(self, loading: Loading) -> AbstractContextManager[tuple[Progress, Progress]]:
        """See ``Screen``."""
        return report.bars(notes, loading)


class PlainScreen(PaintedScreen):
    """Lines in, answers out, everything else on standard error: for pipes and files. Nothing is coloured.

    Attributes:
        mistakes: how many there were.
    """

    def __init__(self) -> None:
        super().__init__(Painter(sys.stdout, terminal=sys.stdout.isatty(), styled=False))
        self.mistakes = 0

    def read(self) -> str:
        """See ``Screen``: one line, in UTF-8 whatever the locale."""
        if sys.stdin.isatty():
            notes.print("> ", end="")
        try:
            line = sys.stdin.buffer.readline()
        except OSError as error:
            raise InputError(f"standard input cannot be read: {error.strerror}") from error
        if not line:
            raise EOFError
        try:
            return line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            self.mistake(InputError(f"this line is not UTF-8 text (byte {error.start:,} cannot be decoded)"))
            return ""

    def mistake(self, error: Exception) -> None:
        """See ``Screen``."""
        self.mistakes += 1
        super().mistake(error)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """See ``Screen``."""
        yield


def show_mistake(error: Exception) -> None:
    """As all commands say it."""
    notes.print(f"error: {' '.join(str(error).split())}", style="red", highlight=False, soft_wrap=True)
