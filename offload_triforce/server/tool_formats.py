"""How model families write the calls of tools."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offload_triforce.server.argument_types import JSON, find_function, parameters_of, typed

_FUNCTION = re.compile(r"\s*<function=([^>\s]+)>\s*")
_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?")
_KEY_OR_END = re.compile(r"\s*([\w.-]+)\s*(?=<arg_key>|\Z)")
_PAIR = re.compile(r"\s*<arg_key>\s*(.*?)\s*</arg_key>\s*<arg_value>(.*?)(?:</arg_value>|\Z)\s*", re.DOTALL)
_NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\][\w-]*)?(?:\[ARGS\])?\s*(?=\{)")


@dataclass(frozen=True)
class Call:
    """A tool's name and its arguments."""

    name: str
    arguments: dict[str, Any]

    def arguments_json(self) -> str:
        """As clients get them."""
        return json.dumps(self.arguments, ensure_ascii=False, allow_nan=False)


Tools = Sequence[Mapping[str, Any]]


def read_calls(text: str, tools: Tools = ()) -> list[Call]:
    """Calls, as they stand between a family's marks; none if the text is not all calls.

    ``tools``: in OpenAI's shape. Arguments that are written as plain text get the types that a tool's schema names.

    - one JSON object, several in a row or a list of them, each with "name" and "arguments" (Hermes, Qwen, Mistral) or
      "parameters" (Llama);
    - a name before a JSON object of arguments, with or without ``[ARGS]`` between (newer Mistral models);
    - ``<function=name><parameter=x>value</parameter></function>`` (Qwen3-Coder, Qwen3.5, Seed-OSS);
    - ``name<arg_key>x</arg_key><arg_value>value</arg_value>`` (GLM).
    """
    text = text.strip().removeprefix("[TOOL_CALLS]")
    if text.startswith("<function="):
        return _functions(text, tools)
    key = _KEY_OR_END.match(text)
    if key and (key.end() < len(text) or find_function(tools, key[1]) is not None):
        return _pairs(key[1], text[key.end() :], tools)
    calls: list[Call] = []
    while text := text.lstrip().lstrip(";,").lstrip():
        named = _NAMED.match(text)
        try:
            value, end = JSON.raw_decode(text, named.end() if named else 0)
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
            arguments = JSON.decode(arguments)
        except (ValueError, RecursionError):
            return None
    if arguments is None:
        arguments = {}
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    call = Call(name, arguments)
    try:
        call.arguments_json()
    except (ValueError, RecursionError):  # no JSON has such numbers
        return None
    return call


def _functions(text: str, tools: Tools) -> list[Call]:
    """``<function=...>``, several in a row. What a value holds is its own: any mark but ``</parameter>``."""
    calls: list[Call] = []
    while match := _FUNCTION.match(text):
        text, arguments, parameters = text[match.end() :], {}, parameters_of(tools, match[1])
        while parameter := _PARAMETER.match(text):
            value, text = _value(text[parameter.end() :])
            arguments[parameter[1]] = typed(value, parameter[1], parameters)
        if not text.startswith("</function>") and text:
            return []
        text = text.removeprefix("</function>").lstrip()
        calls.append(Call(match[1], arguments))
    return [] if text else calls


def _value(text: str) -> tuple[str, str]:
    """A parameter's value, and what follows its end; one that is not closed ends where the next begins."""
    value, closed, rest = text.partition("</parameter>")
    if not closed:
        ends = [place for mark in ("\n<parameter=", "\n</function>") if (place := text.find(mark)) >= 0]
        end = min(ends, default=len(text))
        value, rest = text[:end], text[end:]
    return value.removesuffix("\n"), rest.lstrip()


def _pairs(name: str, text: str, tools: Tools) -> list[Call]:
    arguments, end, parameters = {}, 0, parameters_of(tools, name)
    while end < len(text):
        pair = _PAIR.match(text, end)
        if pair is None:
            return []
        arguments[pair[1]] = typed(pair[2], pair[1], parameters)
        end = pair.end()
    return [Call(name, arguments)]
