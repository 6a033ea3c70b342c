"""How commands end: one sentence and an exit code for every mistake, wherever it shows."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import Any

import typer
from rich.console import Console
from rich.status import Status
from rich.text import Text
from typer.core import TyperGroup

from offload_triforce.errors import TriForceError

MISTAKE, INTERRUPTED = 2, 130
PIPE_CLOSED = 141  # what a shell reports of a program that SIGPIPE has ended
EXPECTED = (TriForceError, KeyboardInterrupt, OSError, MemoryError)  # what ``end`` has a sentence for


class _StandardError:
    """Standard error as it is now. Where it is closed or full, the work goes on without it."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


class _Console(Console):
    """Names of files and models are no markup: "[bnb]" and ":x:" would vanish. A closed pipe is ours to deal with."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def on_broken_pipe(self) -> None:
        raise


notes = _Console(file=_StandardError())  # progress, reports and mistakes


def paper() -> Console:
    """Standard output, for tables."""
    return _Console()


def say(line: str) -> None:
    """A line of progress."""
    notes.print(line, style="dim", highlight=False, soft_wrap=True)


def loading(model: str) -> Status:
    """Something that moves while a model is loaded, on a terminal."""
    return notes.status(Text(f"loading {model}"))


def end(error: BaseException) -> int:
    """Say in one sentence how a command ended; returns the exit code.

    ``error``: one of EXPECTED. A closed pipe (``| head``) is no mistake: nothing is said.
    """
    if isinstance(error, BrokenPipeError):
        _give_up_output()
        return PIPE_CLOSED
    if isinstance(error, KeyboardInterrupt):
        notes.print("interrupted", style="red")
        return INTERRUPTED
    if isinstance(error, TriForceError):
        sentence = str(error)
    elif isinstance(error, OSError):
        sentence = _explain(error)
    else:
        sentence = f"memory ran out: {error}" if str(error) else "memory ran out"
    _say_mistake(sentence)
    return MISTAKE


def _explain(error: OSError) -> str:
    reason = error.strerror or str(error) or type(error).__name__
    if error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {reason}"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF):
        return reason
    _give_up_output()
    return f"the output could not be written: {reason}"


def _say_mistake(sentence: str) -> None:
    notes.print(f"error: {' '.join(sentence.split())}", style="red", highlight=False, soft_wrap=True)


def _give_up_output() -> None:
    """What standard output still holds back cannot go anywhere; the interpreter would try again as it exits."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class Root(TyperGroup):
    """The tree of commands. Unknown options, and help that nobody can read, end like every other mistake."""

    def main(self, *args: Any, standalone_mode: bool = True, **options: Any) -> Any:
        """Run and exit; ``standalone_mode`` False: run and raise. The others: typer's own."""
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **options)
        with contextlib.suppress(AttributeError, ValueError):
            sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to stop
        try:
            code = super().main(*args, standalone_mode=False, **options)
            if sys.stdout is not None:
                sys.stdout.flush()
        except EXPECTED as error:
            code = end(error)
        except typer.Abort:
            code = end(KeyboardInterrupt())
        except Exception as error:
            if not hasattr(error, "format_message"):  # typer's own, which are not at one address in all its versions
                raise
            code = _refuse(error)
        sys.exit(code if isinstance(code, int) else 0)


def _refuse(error: Any) -> int:
    """An option that cannot be understood."""
    message = " ".join(error.format_message().split()).rstrip(".")
    if type(error).__name__ != "NoArgsIsHelpError":  # that one has shown the help
        context = getattr(error, "ctx", None)
        hint = f"; see {context.command_path} --help" if context is not None else ""
        _say_mistake(f"{message[:1].lower()}{message[1:]}{hint}")
    return error.exit_code
