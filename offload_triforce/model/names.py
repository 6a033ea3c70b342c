"""Finding a model by what people call it, in the table of those that every command knows."""

from __future__ import annotations

import difflib
import re

from offload_triforce.model.known import KnownModel
from offload_triforce.model.table import MODELS

__all__ = ["MODELS", "find_known", "hub_id", "nearest"]


def find_known(text: str) -> KnownModel | None:
    """The model of that name, title or hub id; None if the table has none. Capitals and separators do not matter.

    A hub id has to be that of the table to the letter: whoever else calls a model so may have made another one.
    """
    if "/" in text:
        return next((model for model in MODELS if text.lower() in map(str.lower, model.ids)), None)
    return _by_name().get(_plain(text))


def hub_id(known: KnownModel, text: str) -> str:
    """Which of a model's hub ids a text means that ``find_known`` found it by; its name and title mean the first."""
    if _plain(text) in (_plain(known.name), _plain(known.title)) and "/" not in text:
        return known.ids[0]
    return next((other for other in known.ids if _plain(text) == _plain(other)), known.ids[0])


def nearest(text: str) -> str:
    """For a message: the names that come nearest, or where all can be seen."""
    names = _by_name()
    near = [names[key].name for key in difflib.get_close_matches(_plain(text), names, 6, 0.5)]
    near = list(dict.fromkeys(near))[:3]
    return f"nearest are {', '.join(near)}" if near else "`offload-triforce models` shows those that are known"


def _by_name() -> dict[str, KnownModel]:
    names = {_plain(other): model for model in MODELS for other in (model.title, *model.ids)}
    return names | {_plain(model.name): model for model in MODELS}


def _plain(name: str) -> str:
    """Without the organisation, capitals and separators."""
    return re.sub(r"[^a-z0-9]", "", name.split("/")[-1].lower())
