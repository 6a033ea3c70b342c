"""Options that are settings: made from what the fields of ``Settings`` say of themselves, so that it is said once."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Annotated, Any, get_type_hints

import typer

from offload_triforce.config import Settings, replace_settings, unit_of
from offload_triforce.errors import InputError

_KINDS = get_type_hints(Settings)


def takes_settings(*names: str, **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each of these settings.

    The command itself takes ``given`` in their place: a dictionary of those that somebody gave, by name.

    Args:
        names: of settings; all of them, if there are neither names nor defaults.
        defaults: settings, and what the command takes for them where nobody gives them.
    """
    known = {each.name: each for each in fields(Settings)}
    wanted = [known[name] for name in (*names, *defaults)] or list(known.values())
    options = [_option(each, defaults.get(each.name)) for each in wanted]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(*args: Any, **values: Any) -> None:
            given = {each.name: values.pop(each.name) for each in wanted if each.name in values}
            command(*args, given={name: value for name, value in given.items() if value is not None}, **values)

        own = inspect.signature(command, eval_str=True)
        parameters = [each for each in own.parameters.values() if each.name != "given"]
        run.__signature__ = own.replace(parameters=[*parameters, *options])
        run.__annotations__ = {each.name: each.annotation for each in (*parameters, *options)}
        return run

    return decorate


def _option(each: Field, default: Any) -> inspect.Parameter:
    """A setting as an option. None stands for the setting's own default, which only the help shows."""
    about, words = each.metadata, each.name.replace("_", "-")
    kind = _KINDS[each.name]
    names = [f"--{words}/--no-{words}"] if kind is bool else [f"--{words}"]
    shown = False if each.default is None else ("on" if each.default else "off") if kind is bool else str(each.default)
    text = str | None if unit_of(each) else kind | None
    option = typer.Option(
        *names, help=about["help"], rich_help_panel=about.get("panel"), show_default=shown if default is None else True
    )
    where = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(each.name, where, default=default, annotation=Annotated[text, option])


def build_settings(given: dict[str, Any], config: str | None = None) -> Settings:
    """Settings from options that were given, and from a file.

    Raises:
        InputError: a value out of range, or a file that holds no settings.
    """
    values: dict[str, Any] = {}
    if config is not None:
        from offload_triforce.generation.prompt import read_text

        try:
            values = json.loads(read_text(config))
        except (ValueError, RecursionError) as error:  # too many digits, too many brackets
            if isinstance(error, InputError):
                raise
            raise InputError(f"{config} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise InputError(f"{config} must hold one JSON object of settings")
    return replace_settings(Settings(), values | given)
