"""Sizes, speeds and counts as people write them, read the same wherever they are given.

GB is 10^9 bytes and GiB 2^30; K and M of tokens are 2^10 and 2^20. Thousands may be set apart: 131,072. Capitals do not
matter, but for one: a small b behind a capital prefix (25Gb/s) is a bit.
"""

from __future__ import annotations

import re
from decimal import Decimal

from offload_triforce.errors import InputError

_PREFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_PREFIXES |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_COUNTS = {"": 1, "k": 2**10, "m": 2**20}
# More tokens than any text has; what is larger is a slip, and would end as an overflow far from here.
MOST_TOKENS = 2**40
MOST_BYTES = 2**60  # likewise
_NUMBER = re.compile(r"\s*(-?)([0-9]{1,3}(?:[,_][0-9]{3})+|[0-9]+)?(\.[0-9]+)?\s*([a-zA-Z]*)(/s)?\s*")


def parse_tokens(text: str, option: str = "") -> int:
    """A number of tokens: 128K is 131,072, 1M is 1,048,576. ``option``: where it was given, for the message.

    Raises:
        InputError: not such a number, or one with a fraction of a token.
    """
    number, unit, per_second = _split(text)
    wrong = f"{_given(text, option)} is not a number of tokens; write it as 131072, 131,072, 128K or 1M"
    if number is None or number < 0 or per_second or unit.lower() not in _COUNTS:
        raise InputError(wrong)
    if not unit and number != int(number):  # 131.072 as some write 131,072
        raise InputError(wrong)
    tokens = int(number * _COUNTS[unit.lower()])
    if tokens > MOST_TOKENS:
        raise InputError(f"{_given(text, option)} is more than any text has; at most {MOST_TOKENS:,} tokens are read")
    return tokens


def parse_bytes(text: str, option: str = "") -> int:
    """A size in bytes, greater than 0: 24GB and 24G are 24 * 10^9, 24GiB and 24Gi are 24 * 2^30.

    Raises:
        InputError: names the option.
    """
    number, unit, per_second = _split(text)
    prefix, bits = _read_unit(unit)
    if bits and number is not None and not per_second:
        raise InputError(f"{_given(text, option)} is in bits; write bytes with a capital, as {number:f}{unit[:-1]}B")
    if number is None or not unit or per_second or prefix is None:
        raise InputError(f"{_given(text, option)} is not a size; write it as 24GB (10^9 bytes) or 24GiB (2^30)")
    size = int(_positive(number, text, option) * prefix)
    if size > MOST_BYTES:
        raise InputError(f"{_given(text, option)} is more than any machine has; at most {MOST_BYTES:,} bytes are read")
    return size


def parse_speed(text: str, option: str = "", bare: bool = False) -> float:
    """A bandwidth in GB/s (10^9 bytes per second), greater than 0: 25GB/s, 25 GB/s; 25Gb/s is an eighth of that.

    ``bare``: a number alone is in GB/s, since the option's name says so.

    Raises:
        InputError: names the option.
    """
    number, unit, per_second = _split(text)
    if unit == "" and not per_second and bare and number is not None:
        return float(_positive(number, text, option))
    if unit.endswith(("gbps", "mbps")):
        raise InputError(f"{_given(text, option)} may mean bytes or bits; write GB/s for bytes, Gb/s for bits")
    if unit.endswith("ps"):
        unit, per_second = unit.removesuffix("ps"), True
    prefix, bits = _read_unit(unit)
    if number is None or not unit or not per_second or prefix is None:
        raise InputError(f"{_given(text, option)} is not a bandwidth; write it as 25GB/s")
    return float(_positive(number, text, option) * prefix / (8 if bits else 1) / 10**9)


def gigabytes(size: float) -> str:
    """For people: 10^9 bytes, two digits where there are few."""
    return f"{size / 1e9:.2f} GB" if abs(size) < 1e10 else f"{size / 1e9:.1f} GB"


def _given(text: str, option: str) -> str:
    return f"{option} {text!r}".strip()


def _positive(number: Decimal, text: str, option: str) -> Decimal:
    if number <= 0:
        raise InputError(f"{option or 'it'} must be greater than 0, not {' '.join(text.split())}")
    return number


def _split(text: str) -> tuple[Decimal | None, str, bool]:
    """The number, the unit without "per second", and whether it had one. None, "" and False where it is no number."""
    match = _NUMBER.fullmatch(text)
    if match is None or not (match[2] or match[3]):
        return None, "", False
    sign, whole, rest, unit, per_second = match.groups()
    digits = (whole or "0").replace(",", "").replace("_", "")
    return Decimal(f"{sign}{digits}{rest or ''}"), unit, per_second is not None


def _read_unit(unit: str) -> tuple[int | None, bool]:
    """How many bytes (or bits) a unit is, None if it is not one; and whether it counts bits."""
    if unit.lower().endswith("bit"):
        return _PREFIXES.get(unit[:-3].lower()), True
    bits = re.fullmatch(r"[KMGT]i?b", unit) is not None
    return _PREFIXES.get(unit.lower().removesuffix("b")), bits
