"""Arguments of tools that a model writes as plain text: what they are is what the tool's JSON schema says."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

DEEPEST, MOST = 16, 256  # references within references, and schemas of one parameter; what is beyond says nothing
_TRUTH = {"true": True, "1": True, "false": False, "0": False}  # chat templates write Python's True, too
_NOTHING = ("null", "none")


def find_function(tools: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any] | None:
    """The function of that name; None where there is none. ``tools``: in OpenAI's shape."""
    functions = (tool.get("function") for tool in tools)
    return next((each for each in functions if isinstance(each, dict) and each.get("name") == name), None)


def parameters_of(tools: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """The schema of a tool's parameters; empty where there is none."""
    parameters = (find_function(tools, name) or {}).get("parameters")
    return parameters if isinstance(parameters, dict) else {}


def properties_of(parameters: dict[str, Any]) -> dict[str, Any]:
    """The schemas of single parameters, by name."""
    found: dict[str, Any] = {}
    for schema in alternatives(parameters, parameters):
        properties = schema.get("properties")
        found |= properties if isinstance(properties, dict) else {}
    return found


def typed(text: str, name: str, parameters: dict[str, Any]) -> Any:
    """The value that a text stands for, of the parameter ``name``.

    A text stays one where its schema says so, whatever it looks like. Where the schema allows other types beside it, or
    they alone, the text becomes the first of them that it can be read as; else it stays what it is. A parameter without
    a schema is JSON if it looks like a list, an object, a number or a truth value.
    """
    schema = properties_of(parameters).get(name)
    choices = alternatives(schema, parameters)
    values = [value for choice in choices for value in fixed_values(choice)]
    if text in values:
        return text
    types = [kind for choice in choices for kind in named_types(choice)]
    for kind in types or [type_name(value) for value in values]:
        if (read := _read(text, kind)) is not None:
            return read[0]
    return text if types or values else _guessed(text)


def alternatives(schema: Any, root: dict[str, Any]) -> list[dict[str, Any]]:
    """A schema, and those that it is made of: by references within ``root``, anyOf, oneOf and allOf."""
    return list(islice(_alternatives(schema, root, 0), MOST))


def _alternatives(schema: Any, root: dict[str, Any], depth: int) -> Iterator[dict[str, Any]]:
    if not isinstance(schema, dict) or depth > DEEPEST:
        return
    yield schema
    if isinstance(reference := schema.get("$ref"), str):
        yield from _alternatives(_referred(reference, root), root, depth + 1)
    for way in ("anyOf", "oneOf", "allOf"):
        for choice in schema[way] if isinstance(schema.get(way), list) else []:
            yield from _alternatives(choice, root, depth + 1)


def type_name(value: Any) -> str:
    """JSON schema's name for the type of a value."""
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")


def _referred(reference: str, root: Any) -> Any:
    for step in reference.removeprefix("#/").split("/"):
        root = root.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(root, dict) else None
    return root


def named_types(schema: dict[str, Any]) -> list[str]:
    """The types that a schema names itself."""
    named = schema.get("type")
    types = named if isinstance(named, list) else [named]
    return [kind for kind in types if isinstance(kind, str)] + (["null"] if schema.get("nullable") is True else [])


def fixed_values(schema: dict[str, Any]) -> list[Any]:
    """The values that a schema itself allows alone; none where it does not say."""
    values = schema.get("enum")
    return [*(values if isinstance(values, list) else []), *([schema["const"]] if "const" in schema else [])]


def _read(text: str, kind: str) -> tuple[Any] | None:
    """A text as a value of some type, in a tuple of one; None if it is none of that type."""
    word = text.strip().lower()
    if kind == "boolean":
        return (_TRUTH[word],) if word in _TRUTH else None
    if kind == "null":
        return (None,) if word in _NOTHING else None
    value = _guessed(text)
    if kind == "integer" and isinstance(value, float) and value.is_integer():
        value = int(value)  # JSON schema counts 3.0 among the integers
    fits = {"integer": int, "number": (int, float), "array": list, "object": dict}.get(kind)
    return (value,) if fits is not None and isinstance(value, fits) and not isinstance(value, bool) else None


def _guessed(text: str) -> Any:
    """JSON if it is a list, an object, a number or a truth value, else the text itself."""
    try:
        value = JSON.decode(text)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, str) else value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):  # it could not be told on: JSON has no such number
        raise ValueError(f"{text} is no number that JSON has")
    return number


# Python reads more than JSON has.
JSON = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)
