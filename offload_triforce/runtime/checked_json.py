"""Values of a manifest, of which nothing is believed: each is of the kind and size that it must be, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn


class ManifestError(Exception):
    """What is wrong, as the end of "its manifest ..."."""


class VersionError(ManifestError):
    """It is of a version that is not read here."""


def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object as JSON's reader has it.

    Raises:
        ValueError: a key is there twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key twice")
    return found


def no_float(_: str) -> NoReturn:
    """For numbers that are not whole.

    Raises:
        ValueError: in any case.
    """
    raise ValueError("a number that is not whole")


def an_object(value: Any, keys: str, what: str) -> dict[str, Any]:
    """An object of just these ``keys``, with spaces between. Raises ``ManifestError``, as all that follow do."""
    if not isinstance(value, dict) or value.keys() != set(keys.split()):
        raise ManifestError(f"has other entries than it should {what}")
    return value


def a_list(value: Any, what: str, length: int | None = None, most: int | None = None) -> list[Any]:
    """A list of so many values."""
    if not isinstance(value, list) or (length is not None and len(value) != length):
        count = "some" if length is None else f"{length:,}"
        raise ManifestError(f"does not list {count} {what}")
    if most is not None and len(value) > most:
        raise ManifestError(f"lists {len(value):,} {what}, and more than {most:,} are never written")
    return value


def a_number(value: Any, most: int, what: str, least: int = 0) -> int:
    """A whole number within limits."""
    if type(value) is not int or not least <= value <= most:
        raise ManifestError(f"gives {str(value)[:40]!r} as {what}, not a whole number between {least:,} and {most:,}")
    return value


def a_text(value: Any, fits: Callable[[str], Any], what: str) -> str:
    """A text that fits."""
    if not isinstance(value, str) or not fits(value):
        raise ManifestError(f"gives {str(value)[:40]!r} as {what}")
    return value
