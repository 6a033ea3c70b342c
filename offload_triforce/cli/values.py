"""What options say: numbers with units, read as everywhere else, and numbers that make sense."""

from __future__ import annotations

import math

from offload_triforce.errors import InputError
from offload_triforce.machine.units import parse_speed, parse_tokens

LEAST_TEMPERATURE = 1e-5


def read_tokens(text: str, option: str, least: int = 1, most: int | None = None) -> int:
    """A number of tokens: 128K, 131,072.

    Raises:
        InputError: no such number, or one out of range.
    """
    tokens = parse_tokens(text, option)
    if tokens < least or (most is not None and tokens > most):
        reach = f"at least {least:,}" if most is None else f"between {least:,} and {most:,}"
        raise InputError(f"{option} must be {reach} tokens, not {tokens:,}")
    return tokens


def read_speed(text: str, option: str) -> float:
    """A bandwidth in GB/s: 25GB/s, 25Gb/s, or a number alone.

    Raises:
        InputError: no such number.
    """
    return parse_speed(text, option, bare=True)


def check_finite(**options: float | None) -> None:
    """Refuse what is no number or has no end. ``options``: values by name, None where not given.

    Raises:
        InputError: names the option.
    """
    for name, value in options.items():
        if value is not None and not math.isfinite(value):
            raise InputError(f"--{name.replace('_', '-')} must be a finite number, not {value:g}")


def check_temperatures(*temperatures: float) -> None:
    """Refuse temperatures that scores cannot be divided by.

    Raises:
        InputError: not a number, negative, infinite, or so small that scores would overflow.
    """
    for value in temperatures:
        check_finite(temperature=value)
        if value < 0:
            raise InputError(f"--temperature must not be negative, not {value:g}")
        if 0 < value < LEAST_TEMPERATURE:
            raise InputError(f"--temperature {value:g} is too small to divide by; take 0, which is greedy")
