"""Grammars of one call of a tool, in the way in which a model writes calls: for llguidance, in its dialect of Lark."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from offload_triforce.server.argument_types import alternatives, fixed_values, named_types, properties_of, type_name
from offload_triforce.server.errors import invalid, quote

# Models write JSON with and without spaces and lines; but one that has lost its way must not go on with them for ever.
WHITE_SPACE = {"whitespace_pattern": r"[ \n\t]{0,16}"}
_TOOLS = "tools"
NAME = "name_of_a_tool"
MOST_RULES = 2000  # of a grammar: parameters of all tools that may be called
_TAG = re.compile(r"[^<>\s]+")  # what can stand in <function=...>

Mark = Callable[[str], str]
Function = dict[str, Any]


class CallGrammar:
    """The rules, as they come together.

    What models write between fixed marks is JSON by a tool's schema, or plain text parameter by parameter. Plain text
    is held to the types of a schema, its fixed values and what is required; not to patterns and lengths of texts.
    """

    def __init__(self, template: str, mark: Mark) -> None:
        """``template``: of chats. ``mark``: how a grammar spells a mark, which may be a token of its own."""
        self._template, self._mark, self._rules = template, mark, list[str]()
        self.example = ""  # a call of a tool NAME as this grammar has it, without arguments

    def of(self, functions: Sequence[Function]) -> str:
        """The whole grammar, for a call of one of these functions, as OpenAI's ``tools`` hold them."""
        opening, closing = ("<tool_call>", "</tool_call>")
        if "<seed:tool_call>" in self._template:
            opening, closing = ("<seed:tool_call>", "</seed:tool_call>")
        around = (self._mark(opening), self._mark(closing))
        if "<function=" in self._template:
            start, body = f'{around[0]} "\\n" call "\\n" {around[1]}', self._as_functions
            self.example = f"{opening}\n<function={NAME}>\n</function>\n{closing}"
        elif "<arg_key>" in self._template:
            start, body = f"{around[0]} call {around[1]}", self._as_pairs
            self.example = f"{opening}{NAME}{closing}"
        elif "[ARGS]" in self._template:
            start, body = f"{self._mark('[TOOL_CALLS]')} call", self._as_named_json
            self.example = f"[TOOL_CALLS]{NAME}[ARGS]{{}}"
        elif "[TOOL_CALLS]" in self._template:
            start, body = f'{self._mark("[TOOL_CALLS]")} "[" call "]"', partial(self._as_json, "arguments")
            self.example = f'[TOOL_CALLS][{{"name": "{NAME}", "arguments": {{}}}}]'
        elif "<tool_call>" in self._template:
            self.example = f'{opening}\n{{"name": "{NAME}", "arguments": {{}}}}\n{closing}'
            start, body = f'{around[0]} "\\n" call "\\n" {around[1]}', partial(self._as_json, "arguments")
        else:
            self.example = f'{{"name": "{NAME}", "parameters": {{}}}}'
            start, body = "call", partial(self._as_json, "parameters")
        calls = [body(number, function) for number, function in enumerate(functions)]
        return "\n".join([f"start: {start}", f"call: {' | '.join(calls)}", *self._rules])

    def _as_functions(self, number: int, function: Function) -> str:
        """``<function=name><parameter=x>value</parameter></function>``."""
        _check_tag(function["name"])

        def one(name: str, schema: Any, root: dict[str, Any]) -> str:
            _check_tag(name)
            value = self._value(schema, root, '"\\n"', "</parameter>")
            return f'{_text(f"<parameter={name}>")} "\\n" {value} "\\n"'

        opening = _text(f"<function={function['name']}>")
        return self._call(number, function, f'{opening} "\\n"', one, '"</function>"')

    def _as_pairs(self, number: int, function: Function) -> str:
        """``name<arg_key>x</arg_key><arg_value>value</arg_value>``, with lines between or without."""
        _check_tag(function["name"])

        def one(name: str, schema: Any, root: dict[str, Any]) -> str:
            _check_tag(name)
            value = self._value(schema, root, "", "</arg_value>")
            key = f"{self._mark('<arg_key>')} {_text(name)} {self._mark('</arg_key>')}"
            return f'{key} "\\n"? {self._mark("<arg_value>")} {value} "\\n"?'

        return self._call(number, function, f'{_text(function["name"])} "\\n"?', one, "")

    def _as_json(self, argument: str, number: int, function: Function) -> str:
        """``{"name": name, "arguments": {...}}``. Schemas stay apart, since each may refer to parts of itself."""
        self._rule("ws", r"/[ \n\t]{0,16}/")
        words = ["{", '"name"', ":", json.dumps(function["name"], ensure_ascii=False), ",", f'"{argument}"', ":"]
        opening = " ws ".join(map(_text, words))
        return self._rule(f"c{number}", f'{opening} ws {self._arguments(number, function)} ws "}}"')

    def _as_named_json(self, number: int, function: Function) -> str:
        """``name[ARGS]{...}``."""
        _check_tag(function["name"])
        known = f"{self._mark('[CALL_ID]')} /[a-zA-Z0-9]{{9}}/" if "[CALL_ID]" in self._template else ""
        words = [_text(function["name"]), known, self._mark("[ARGS]"), self._arguments(number, function)]
        return self._rule(f"c{number}", " ".join(words))

    def _arguments(self, number: int, function: Function) -> str:
        """A rule for all arguments as one JSON object."""
        schema = {"type": "object", **(function.get("parameters") or {})}
        return self._rule(f"a{number}", f"%json {schema_text(schema, _TOOLS)}")

    def _call(
        self, number: int, function: Function, begin: str, one: Callable[[str, Any, dict[str, Any]], str], end: str
    ) -> str:
        """A rule for a call: its parameters in the schema's order, those that are not required perhaps left out."""
        root = function.get("parameters") or {}
        properties = properties_of(root)
        required = {name for schema in alternatives(root, root) for name in _texts(schema.get("required"))}
        if missing := sorted(required - set(properties)):
            message = f"tools: {function['name']} requires {quote(missing[0])}, which is not among its properties"
            raise invalid(message, _TOOLS)
        parts = []
        for place, (name, schema) in enumerate(properties.items()):
            parts.append(f"c{number}p{place}" + ("" if name in required else "?"))
            self._rule(f"c{number}p{place}", one(name, schema, root))
        return self._rule(f"c{number}", " ".join([begin, *parts, end]))

    def _value(self, schema: Any, root: dict[str, Any], before_end: str, end: str) -> str:
        """A value and the mark that ends it."""
        kinds = alternatives(schema, root)
        fixed = [value for kind in kinds for value in fixed_values(kind)]
        types = {name for kind in kinds for name in named_types(kind)} or {type_name(value) for value in fixed}
        close, new = f"{before_end} {self._mark(end)}", f"v{len(self._rules)}"
        if "string" in types and fixed and all(isinstance(value, str) for value in fixed):
            choices = " | ".join(_text(value) for value in fixed)
            return f"{self._rule(new, choices)} {close}"
        if types and "string" not in types:
            whole = {**schema, **{name: root[name] for name in ("$defs", "definitions") if name in root}}
            return f"{self._rule(new, f'%json {schema_text(whole, _TOOLS)}')} {close}"
        return self._any_text(end)

    def _any_text(self, end: str) -> str:
        """Any text up to a mark, and the mark."""
        mark = self._mark(end)
        if mark.startswith("<"):  # a token of its own, which no text holds
            return f"{self._rule('words', '/(?s:.*)/')} {mark}"
        return self._rule("text", "/(?s:.*)/", f"[suffix={mark}]")

    def _rule(self, name: str, body: str, options: str = "") -> str:
        rule = f"{name}{options}: {body}"
        if rule not in self._rules:
            self._rules.append(rule)
        if len(self._rules) > MOST_RULES:
            raise invalid(f"tools has too many parameters: a call can be forced for {MOST_RULES:,} at most", _TOOLS)
        return name


def schema_text(schema: dict[str, Any], param: str) -> str:
    """A schema as a grammar holds it.

    Raises:
        ApiError: it is not JSON.
    """
    try:
        return json.dumps({**schema, "x-guidance": WHITE_SPACE}, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise invalid(f"{param}: the schema is not JSON: {error}", param) from None


def _check_tag(name: str) -> None:
    if not _TAG.fullmatch(name):
        raise invalid(f"tools: {quote(name)} cannot stand in a call as this model writes it", _TOOLS)


def _texts(values: Any) -> list[str]:
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []


def _text(text: str) -> str:
    """A text as a grammar spells it."""
    return json.dumps(text, ensure_ascii=False)
