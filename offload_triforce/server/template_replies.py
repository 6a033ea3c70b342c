"""Answers taken apart by what a model's tokenizer says of them: transformers' response templates."""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from offload_triforce.server.replies import Part, Reasoning, Text, ToolCall
from offload_triforce.server.tool_formats import read_call

REASONING = ("thinking", "reasoning", "reasoning_content")


def has_response_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer says how answers are to be read. Older releases of transformers know of no such thing."""
    return getattr(tokenizer, "response_template", None) is not None and hasattr(tokenizer, "get_response_parser")


class TemplateParser:
    """A ``ReplyParser`` by a response template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_end: str, tools: list[dict[str, Any]]) -> None:
        self._parser = tokenizer.get_response_parser(prefix=prompt_end, tools=tools or None)
        self._told = False  # some of the region that is open
        self._broken = False

    def feed(self, text: str) -> list[Part]:
        """See ``ReplyParser``."""
        if self._broken:
            return [Text(text)] if text else []
        try:
            return self._parts(self._parser.feed(text))
        except Exception:  # the model has written what its own template cannot read: then it is text
            self._broken = True
            return [Text(text)]

    def finish(self) -> list[Part]:
        """See ``ReplyParser``."""
        if self._broken:
            return []
        try:
            return self._parts(self._parser.finalize()[1])
        except Exception:  # likewise
            return []

    def _parts(self, events: list[dict[str, Any]]) -> list[Part]:
        parts: list[Part] = []
        for event in events:
            name, kind = event["field"], event["type"]
            if name == "tool_calls":
                if kind == "region_close":
                    parts += _calls(event["value"])
                continue
            make = Reasoning if name in REASONING else Text
            if kind == "region_open":
                self._told = False
            elif kind == "region_chunk" and not event.get("dirty") and event["text"]:
                self._told = True
                parts.append(make(event["text"]))
            elif kind == "region_close" and not self._told and event["value"]:
                value = event["value"]
                parts.append(make(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
        return parts


def _calls(value: Any) -> list[Part]:
    values = value if isinstance(value, list) else [value]
    calls = [read_call(each) for each in values]
    return [ToolCall(call.name, call.arguments_json()) for call in calls if call is not None]
