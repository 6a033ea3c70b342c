"""What all commands share: how mistakes end, what is kept quiet, how settings are read."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from offload_triforce.errors import InputError, TriForceError

notes = Console(stderr=True)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """A user's mistake is one sentence and exit code 2; Ctrl-C is one sentence and 130."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            _quiet()
            command(*args, **kwargs)
        except TriForceError as error:
            notes.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            notes.print("interrupted", style="red")
            raise typer.Exit(130) from None

    return run


def _quiet() -> None:
    """transformers' own bars and warnings are not for the user of this tool."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported: the GGUF reader has a bar of its own
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def check_folders(*paths: Path | None) -> None:
    """Refuse files that could not be written, before the work starts."""
    for path in paths:
        if path is not None and not path.absolute().parent.is_dir():
            raise InputError(f"the folder of {path} does not exist; create it first")


def build_settings(config: str | None, **options: Any) -> Any:
    """Settings from a file and from options that were given."""
    from offload_triforce.config import Settings, replace_settings
    from offload_triforce.prompt import read_text

    values: dict[str, Any] = {}
    if config is not None:
        try:
            values = json.loads(read_text(config))
        except json.JSONDecodeError as error:
            raise InputError(f"{config} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise InputError(f"{config} must hold one JSON object of settings")
    given = {name: value for name, value in options.items() if value is not None}
    return replace_settings(Settings(), values | given)
