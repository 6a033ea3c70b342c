"""What /set changes in the middle of a conversation, and what it cannot."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any

from offload_triforce.config import Settings
from offload_triforce.errors import InputError
from offload_triforce.generation.dialogue import MOST_SEED, NEW_TOKENS, Dialogue
from offload_triforce.generation.options import RANGES, SAMPLING, Range
from offload_triforce.machine.units import parse_tokens

KEYS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "max_new_tokens",
    "seed",
)
_SEEDS = Range(0, MOST_SEED - 1, whole=True)
_MODELS_OWN = "default"


def change(dialogue: Dialogue, key: str, text: str) -> list[str]:
    """Change an option of the answers to come; "default" gives it back to the model.

    Returns:
        What there is to say about it: how it is now, and whether that does anything.

    Raises:
        InputError: there is no such option, it needs another start, or the value is out of range.
    """
    name = key.replace("-", "_").lower()
    if name not in KEYS:
        raise InputError(_unknown(key, name, text))
    if name == "seed":
        dialogue.seed = _read(name, text, _SEEDS)
    elif text == _MODELS_OWN:
        dialogue.options.pop(name, None)
    else:
        dialogue.options[name] = _read(name, text, RANGES[name])
    told = [_shown(dialogue, name)]
    if dialogue.greedy and name in SAMPLING and name != "temperature":
        told.append("nothing is drawn at temperature 0, so this does nothing yet: /set temperature 0.7")
    return told


def shown(dialogue: Dialogue) -> list[str]:
    """All that can be changed, as it is now, line by line."""
    return [_shown(dialogue, name) for name in KEYS]


def _shown(dialogue: Dialogue, name: str) -> str:
    config = dialogue.engine.model.generation_config
    if name == "seed":
        return f"{name} = {dialogue.seed}"
    if name in dialogue.options:
        return f"{name} = {dialogue.options[name]:g}"
    if name == "max_new_tokens":
        return f"{name} = {NEW_TOKENS} (or what fits)"
    if name == "temperature" and not config.do_sample:
        return f"{name} = 0 (the model's own: greedy)"
    own = getattr(config, name, None)
    return f"{name} = {'off' if own is None else f'{own:g}'} (the model's own)"


def _read(name: str, text: str, allowed: Range) -> Any:
    try:
        value = parse_tokens(text, name) if name == "max_new_tokens" else int(text) if allowed.whole else float(text)
    except InputError:
        raise
    except ValueError:
        value = text
    if not allowed.holds(value):
        raise InputError(f"{name} must be {allowed}, not {text}")
    return value


def _unknown(key: str, name: str, text: str) -> str:
    if name in {each.name for each in fields(Settings)}:
        option = f"--{name.replace('_', '-')}"
        return (
            f"{name} cannot be changed while the model is in use: /save the conversation, and start again with "
            f"{option} {text} --session NAME"
        )
    near = difflib.get_close_matches(name, KEYS, n=1)
    return f"there is no {key} to set; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(KEYS)}")
