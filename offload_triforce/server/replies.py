"""What an answer consists of, while it comes: text, reasoning apart from it, and calls of tools."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from offload_triforce.server.spelling import overlap
from offload_triforce.server.tool_formats import Call, Tools, read_calls

THINKING = {"<think>": "</think>", "[THINK]": "[/THINK]", "<seed:think>": "</seed:think>"}
CALLING = {
    "<tool_call>": "</tool_call>",
    "<seed:tool_call>": "</seed:tool_call>",
    "[TOOL_CALLS]": "",  # to the end of the answer
    "<|python_tag|>": "",
}


@dataclass(frozen=True)
class Text:
    """Some of the answer."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """Some of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool. ``arguments``: JSON."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")


Part = Text | Reasoning | ToolCall


class ReplyParser(Protocol):
    """Takes an answer apart."""

    def feed(self, text: str) -> list[Part]:
        """More of it."""

    def finish(self) -> list[Part]:
        """Nothing more comes."""


class MarkParser:
    """By the marks that common families set: ``<think>``, ``<tool_call>``, ``[TOOL_CALLS]``, or JSON alone (Llama)."""

    def __init__(self, prompt_end: str, tools: Tools) -> None:
        """``prompt_end``: it may have opened the reasoning. ``tools``: calls are looked for if there are some."""
        self._tools, self._buffer, self._begun = tools, "", False
        self._close: str | None = None  # the mark that ends where we are; None in plain text
        self._open = ""
        ends = prompt_end.rstrip()
        for mark in THINKING:
            if ends.endswith(mark):
                self._open, self._close, self._begun = mark, THINKING[mark], True
        self._blank = bool(self._open)  # white space around reasoning is nobody's

    def feed(self, text: str) -> list[Part]:
        """See ``ReplyParser``."""
        self._buffer += text
        parts: list[Part] = []
        while self._step(parts, last=False):
            pass
        return parts

    def finish(self) -> list[Part]:
        """See ``ReplyParser``."""
        parts: list[Part] = []
        while self._step(parts, last=True):
            pass
        return parts

    def _step(self, parts: list[Part], last: bool) -> bool:
        """Take something off the buffer; False if there is nothing to be taken for now."""
        if self._close is not None:
            return self._inside(parts, last)
        if not self._begun:
            start = self._buffer.lstrip()
            undecided = any(len(start) < len(mark) and mark.startswith(start) for mark in THINKING)
            if undecided and not last:
                return False
            self._begun = True
            mark = next((mark for mark in THINKING if start.startswith(mark)), None)
            if mark is not None:
                self._enter(mark, THINKING[mark], start[len(mark) :])
                return True
            if self._tools and start.startswith("{"):
                self._open, self._close = "", ""
                return True
        return self._plain(parts, last)

    def _plain(self, parts: list[Part], last: bool) -> bool:
        marks = CALLING if self._tools else {}
        places = [(place, mark) for mark in marks if (place := self._buffer.find(mark)) >= 0]
        if places:
            place, mark = min(places)
            self._say(parts, self._buffer[:place].rstrip())
            self._enter(mark, marks[mark], self._buffer[place + len(mark) :])
            return True
        held = 0 if last else max((overlap(self._buffer, mark) for mark in marks), default=0)
        ready = self._buffer[: len(self._buffer) - held]
        if self._tools and not last:  # white space may turn out to stand before a call, and is not said then
            ready = ready.rstrip()
        self._buffer = self._buffer[len(ready) :]
        self._say(parts, ready)
        return False

    def _enter(self, mark: str, close: str, rest: str) -> None:
        self._open, self._close, self._buffer = mark, close, rest
        self._blank = True

    def _inside(self, parts: list[Part], last: bool) -> bool:
        """In reasoning, which is told as it comes, or in a call, which is told when it is complete."""
        place = self._buffer.find(self._close) if self._close else -1
        thinking = self._open in THINKING
        if place < 0 and not last:
            if thinking:
                held = overlap(self._buffer, self._close or "")
                self._think(parts, self._buffer[: len(self._buffer) - held])
                self._buffer = self._buffer[len(self._buffer) - held :]
            return False
        inner = self._buffer if place < 0 else self._buffer[:place]
        rest = "" if place < 0 else self._buffer[place + len(self._close or "") :]
        if thinking:
            self._think(parts, inner)
            self._blank = True
        else:
            self._call(parts, inner, closed=place >= 0)
        self._buffer, self._close, self._open = rest, None, ""
        return bool(rest)

    def _call(self, parts: list[Part], inner: str, closed: bool) -> None:
        calls = read_calls(inner, self._tools)
        if calls:
            parts += [ToolCall(call.name, call.arguments_json()) for call in calls]
            self._blank = True
        else:  # it is no call after all
            self._blank = False
            self._say(parts, self._open + inner + ((self._close or "") if closed else ""))

    def _say(self, parts: list[Part], text: str) -> None:
        text = text.lstrip() if self._blank else text
        if text:
            self._blank = False
            parts.append(Text(text))

    def _think(self, parts: list[Part], text: str) -> None:
        text = text.lstrip() if self._blank else text
        if text:
            self._blank = False
            parts.append(Reasoning(text))


def text_of(parts: Sequence[Part], kind: type[Text] | type[Reasoning]) -> str:
    """All text of one kind."""
    return "".join(part.text for part in parts if isinstance(part, kind))


__all__ = ["Call", "MarkParser", "Part", "Reasoning", "ReplyParser", "Text", "ToolCall", "text_of"]
