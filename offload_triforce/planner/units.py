"""Sizes, speeds and counts as people write them. GB is 10^9 bytes and GiB 2^30; K and M of tokens are 2^10 and 2^20."""

from __future__ import annotations

import re

from offload_triforce.errors import InputError

_SIZES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_COUNTS = {"": 1, "k": 2**10, "m": 2**20}
_NUMBER = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([a-z/]*)\s*", re.IGNORECASE)


def parse_tokens(text: str) -> int:
    """A number of tokens: 128K is 131,072, 1M is 1,048,576.

    Raises:
        InputError: not such a number.
    """
    number, unit = _split(text)
    if number is None or unit not in _COUNTS or number * _COUNTS[unit] < 2:
        raise InputError(f"{text!r} is not a number of tokens; write it as 131072, 128K or 1M")
    return int(number * _COUNTS[unit])


def parse_bytes(text: str, option: str) -> int:
    """A size in bytes: 24GB is 24 * 10^9, 24GiB is 24 * 2^30.

    Raises:
        InputError: names the option.
    """
    number, unit = _split(text)
    if not number or unit not in _SIZES:
        raise InputError(f"{option} {text!r} is not a size; write it as 24GB (10^9 bytes) or 24GiB (2^30)")
    return int(number * _SIZES[unit])


def parse_speed(text: str, option: str) -> float:
    """A bandwidth in GB/s (10^9 bytes per second).

    Raises:
        InputError: names the option.
    """
    number, unit = _split(text)
    size = unit.removesuffix("/s")
    if not number or not unit.endswith("/s") or size not in _SIZES:
        raise InputError(f"{option} {text!r} is not a bandwidth; write it as 25GB/s")
    return number * _SIZES[size] / 1e9


def gigabytes(size: float) -> str:
    """For people: 10^9 bytes, two digits where there are few."""
    return f"{size / 1e9:.2f} GB" if abs(size) < 1e10 else f"{size / 1e9:.1f} GB"


def _split(text: str) -> tuple[float | None, str]:
    match = _NUMBER.fullmatch(text)
    return (float(match[1]), match[2].lower()) if match else (None, "")
