"""How model families write the calls of tools."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_XML_CALL = re.compile(r"\s*<function=([^>\s]+)>(.*?)(?:</function>|\Z)\s*", re.DOTALL)
_XML_ARGUMENT = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL)
_NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\][\w-]*)?(?:\[ARGS\])?\s*(?=\{)")
_json = json.JSONDecoder()


@dataclass(frozen=True)
class Call:
    """A tool's name and its arguments."""

    name: str
    arguments: dict[str, Any]


def read_calls(text: str) -> list[Call]:
    """Calls, as they stand between a family's marks; none if the text is not all calls.

    - one JSON object, several in a row or a list of them, each with "name" and "arguments" (Hermes, Qwen, Mistral) or
      "parameters" (Llama);
    - a name before a JSON object of arguments, with or without ``[ARGS]`` between (newer Mistral models);
    - ``<function=name><parameter=x>value</parameter></function>`` (Qwen3-Coder, Qwen3.5).
    """
    text = text.strip().removeprefix("[TOOL_CALLS]")
    if text.startswith("<function="):
        return _xml(text)
    calls: list[Call] = []
    while text := text.lstrip().lstrip(";,").lstrip():
        named = _NAMED.match(text)
        try:
            value, end = _json.raw_decode(text, named.end() if named else 0)
        except (ValueError, RecursionError):
            return []
        if named:
            value = {"name": named[1], "arguments": value}
        found = [read_call(part) for part in (value if isinstance(value, list) else [value])]
        if not all(found):
            return []
        calls += [call for call in found if call is not None]
        text = text[end:].removeprefix("[TOOL_CALLS]")
    return calls


def read_call(value: Any) -> Call | None:
    """A call out of an object with "name" and "arguments" or "parameters"; None if it is no call."""
    if not isinstance(value, dict):
        return None
    value = value["function"] if isinstance(value.get("function"), dict) else value
    name = value.get("name")
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):  # JSON in JSON
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if arguments is None:
        arguments = {}
    return Call(name, arguments) if isinstance(name, str) and isinstance(arguments, dict) else None


def _xml(text: str) -> list[Call]:
    calls, end = [], 0
    while match := _XML_CALL.match(text, end):
        if match.end() == end:
            break
        arguments = {name: _value(value) for name, value in _XML_ARGUMENT.findall(match[2])}
        calls.append(Call(match[1], arguments))
        end = match.end()
    return calls if end == len(text) else []


def _value(text: str) -> Any:
    """A parameter in XML: JSON if it is a list, an object, a number or a truth value, else the text itself."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, str) else value
