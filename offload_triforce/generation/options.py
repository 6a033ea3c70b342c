"""The options of a request, one by one: their types and ranges, before transformers sees them.

transformers refuses some values only where they are used, drops others (a top_p above 1), and speaks of classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from transformers import GenerationConfig

from offload_triforce.errors import InputError


@dataclass(frozen=True)
class Range:
    """Numbers from ``least`` (above it: ``more``) to ``most`` (below it: ``less``); ``whole`` ones alone."""

    least: float
    most: float = math.inf
    more: bool = False
    less: bool = False
    whole: bool = False

    def holds(self, value: object) -> bool:
        """Whether a value is such a number. True and False are none."""
        if not isinstance(value, Integral if self.whole else Real) or isinstance(value, bool):
            return False
        number = float(value)
        at_an_open_end = (self.more and number == self.least) or (self.less and number == self.most)
        return self.least <= number <= self.most and number < math.inf and not at_an_open_end

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if self.more:
            return f"{kind} above {self.least:g}" + (f" and at most {self.most:g}" if self.most < math.inf else "")
        if self.most < math.inf:
            return f"{kind} from {self.least:g} to {'below ' if self.less else ''}{self.most:g}"
        return f"{kind} of at least {self.least:g}"


SHARE, PART, COUNT = Range(0, 1), Range(0, 1, more=True), Range(0, whole=True)
SAMPLING = {
    "temperature": Range(0),
    "top_k": COUNT,
    "top_p": SHARE,
    "min_p": SHARE,
    "top_h": PART,
    "typical_p": PART,
    "epsilon_cutoff": Range(0, 1, less=True),
    "eta_cutoff": Range(0, 1, less=True),
}
RANGES = SAMPLING | {
    "repetition_penalty": Range(0, more=True),
    "no_repeat_ngram_size": COUNT,
    "max_new_tokens": Range(1, whole=True),
    "max_length": Range(1, whole=True),
    "min_new_tokens": COUNT,
    "min_length": COUNT,
    "max_time": Range(0, more=True),
}
ONE_ONLY = ("num_beams", "num_return_sequences")  # generate() multiplies the prompt before it asks a callable


def check_call(seed: object, streamer: object) -> None:
    """Refuse what is no seed or no streamer.

    Raises:
        InputError: which, and what it may be.
    """
    if seed is not None and (not isinstance(seed, Integral) or isinstance(seed, bool)):
        raise InputError(f"seed must be a whole number, not {seed!r}")
    if streamer is not None and not (
        callable(getattr(streamer, "put", None)) and callable(getattr(streamer, "end", None))
    ):
        raise InputError(
            f"streamer must have put and end, as a transformers streamer has; {type(streamer).__name__} lacks them"
        )


def check_objects(options: dict[str, Any], config: object) -> None:
    """Refuse what is no generation config, or no list of processors or criteria.

    Raises:
        InputError: which, and what it may be.
    """
    if config is not None and not isinstance(config, GenerationConfig):
        raise InputError(f"generation_config must be a transformers GenerationConfig, not {type(config).__name__}")
    for name in ("logits_processor", "stopping_criteria"):
        given = options.get(name)
        if given is not None and not (isinstance(given, (list, tuple)) and all(callable(part) for part in given)):
            raise InputError(f"{name} must be a list of callables, not {given!r}")


def tidy(options: dict[str, Any], *configs: GenerationConfig | None) -> dict[str, Any]:
    """The options as transformers wants them: ``stop`` under its name there, plain numbers, eos ids in a list.

    Args:
        options: keywords of a request. configs: where what they leave out comes from, in that order.

    Raises:
        InputError: an option out of its range or of another type; several beams or answers, whoever asks for them.
    """
    options = dict(options)
    check_objects(options, configs[0] if configs else None)
    if "stop" in options:
        stop = options.pop("stop")
        if stop is not None and options.get("stop_strings") is not None:
            raise InputError("stop and stop_strings are the same; give one of them")
        if stop is not None:
            options["stop_strings"] = stop
    check_ranges(options)
    for name in RANGES:
        if options.get(name) is not None:
            options[name] = (int if RANGES[name].whole else float)(options[name])
    if options.get("stop_strings") is not None:
        options["stop_strings"] = stop_list(options["stop_strings"])
    if options.get("eos_token_id") is not None:
        options["eos_token_id"] = token_ids("eos_token_id", options["eos_token_id"])
    for name in ONE_ONLY:
        values = (options.get(name), *(getattr(config, name, None) for config in configs))
        check_one(name, next((value for value in values if value is not None), None))
    return options


def check_ranges(source: dict[str, Any] | GenerationConfig, names: Iterable[str] = RANGES) -> None:
    """Refuse what is out of its range. What is None is not given.

    Raises:
        InputError: name, range and value.
    """
    for name in names:
        value = source.get(name) if isinstance(source, dict) else getattr(source, name, None)
        if value is not None and not RANGES[name].holds(value):
            raise InputError(f"{name} must be {RANGES[name]}, not {value!r}")
    do_sample = source.get("do_sample") if isinstance(source, dict) else source.do_sample
    if do_sample is not None and not isinstance(do_sample, bool):
        raise InputError(f"do_sample must be True or False, not {do_sample!r}")


def check_config(config: GenerationConfig) -> None:
    """Refuse what transformers has merged, from wherever it came, and would drop or get wrong.

    Raises:
        InputError: an option out of its range that is in use, several beams or answers, an empty stop string.
    """
    for name in ONE_ONLY:
        check_one(name, getattr(config, name, None))
    check_ranges(config, RANGES if config.do_sample else RANGES.keys() - SAMPLING.keys())
    if config.stop_strings is not None:
        stop_list(config.stop_strings)


def check_one(name: str, value: object) -> None:
    """Refuse several beams or answers.

    Raises:
        InputError: by that name.
    """
    if value is not None and value != 1:
        raise InputError(f"{name}={value!r} is not supported; only 1 is")


def stop_list(stop: object) -> list[str]:
    """One stop string or several, as a list.

    Raises:
        InputError: something else, or one that is empty, after which there would be nothing.
    """
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, (list, tuple, set, frozenset)) or not all(isinstance(s, str) for s in strings):
        raise InputError(f"stop must be a text or a list of texts, not {stop!r}")
    if "" in strings:
        raise InputError("a stop string is empty; leave it out")
    return list(strings)


def token_ids(name: str, value: object) -> list[int]:
    """Token ids that are given as a number, a list or a tensor of them.

    Raises:
        InputError: something else.
    """
    values = [value] if isinstance(value, (Integral, torch.Tensor)) else value
    ids: list[int] = []
    for part in values if isinstance(values, (list, tuple, set, frozenset)) else [values]:
        numbers = part.flatten().tolist() if isinstance(part, torch.Tensor) else [part]
        if not all(isinstance(number, Integral) and not isinstance(number, bool) for number in numbers):
            raise InputError(f"{name} must be a token id or a list of them, not {value!r}")
        ids += [int(number) for number in numbers]
    return ids
