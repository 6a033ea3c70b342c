"""What all commands share: how settings are read, which files may be written, what is kept quiet."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from offload_triforce.cli.ending import EXPECTED, end
from offload_triforce.errors import InputError


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """A command: whatever it ends with that is not the program's fault is one sentence and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            _quiet()
            command(*args, **kwargs)
        except EXPECTED as error:
            raise typer.Exit(end(error)) from None

    return run


def _quiet() -> None:
    """Other libraries' bars and warnings are not for the user of this tool. They read this when they are imported."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the GGUF reader has a bar of its own
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    if "transformers" in sys.modules:  # by whoever calls a command from Python
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()


def examples(*lines: str) -> str:
    """The end of a command's help. Blank lines keep the help's formatter from joining the lines."""
    return "\n\n".join(("Examples:", *lines))


def check_writable(*paths: str | Path | None) -> None:
    """Refuse files that could not be written, before the work starts. What is there stays as it is.

    Raises:
        InputError: names the file and says why.
    """
    for path in paths:
        if path is not None:
            _check_writable(Path(path))


def _check_writable(path: Path) -> None:
    target = os.path.realpath(path)
    existed = os.path.exists(target)
    try:
        # Permissions alone do not tell: the file system may be mounted for reading only. A FIFO must not block.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NONBLOCK", 0)
        os.close(os.open(target, flags, 0o666))
    except (OSError, ValueError) as error:
        if os.path.isdir(target):
            raise InputError(f"{path} is a folder; name a file in it") from error
        if not os.path.isdir(os.path.dirname(target)):
            raise InputError(f"the folder of {path} does not exist; create it first") from error
        raise InputError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    if not existed:
        with contextlib.suppress(OSError):
            os.unlink(target)


class Kept:
    """The JSON of a long measurement, written again and again as far as it is. A full disk does not end the work."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._failed = path, None
        check_writable(path)

    def __call__(self, report: dict[str, Any]) -> None:
        """Write it, or remember why not."""
        if self._path is None:
            return
        try:
            self._path.write_text(json.dumps(report, indent=1))
            self._failed = None
        except OSError as error:
            self._failed = error.strerror

    def close(self, report: dict[str, Any], shown: bool) -> None:
        """At the end: what could not be kept goes to standard output, unless it was ``shown`` there already.

        Raises:
            InputError: it could not be kept.
        """
        if self._failed is None:
            return
        if not shown:
            typer.echo(json.dumps(report))
        raise InputError(f"{self._path} could not be written: {self._failed}; the JSON is on standard output instead")
