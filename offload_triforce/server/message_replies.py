"""Answers in Anthropic's shape, whole and as events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

from offload_triforce.server.answering import Answering
from offload_triforce.server.conversation import Conversation
from offload_triforce.server.replies import Part, Reasoning, Text, ToolCall
from offload_triforce.server.reporter import Ended, Said
from offload_triforce.server.service import Service
from offload_triforce.server.shapes import new_id
from offload_triforce.server.streaming import event
from offload_triforce.speculation.stats import DecodeStats


class Message:
    """One answer."""

    def __init__(self, service: Service, model: str, conversation: Conversation, answering: Answering) -> None:
        self._parser, self._answering = conversation.parser(service), answering
        self._about = {"id": new_id("msg"), "type": "message", "role": "assistant", "model": model}
        self._one_call, self._prompt = conversation.one_call, answering.prompt_tokens
        self._open: type[Part] | None = None  # the kind of the block that is being told
        self._index, self._called = -1, False

    async def whole(self) -> dict[str, Any]:
        """The answer, when it is complete."""
        blocks: list[dict[str, Any]] = []
        async for happened in self._answering.events():
            if isinstance(happened, Said):
                self._add(blocks, self._parser.feed(happened.text))
            elif isinstance(happened, Ended):
                self._add(blocks, self._parser.finish())
                ending = self._ending(happened)
                return {**self._about, "content": blocks, **ending, "usage": _usage(happened.stats)}
        raise AssertionError("an answer ends")

    async def stream(self) -> AsyncIterator[bytes]:
        """The answer as events."""
        begun = {**self._about, "content": [], "stop_reason": None, "stop_sequence": None}
        yield _event("message_start", message={**begun, "usage": {"input_tokens": self._prompt, "output_tokens": 0}})
        async for happened in self._answering.events():
            if isinstance(happened, Said):
                for part in self._wanted(self._parser.feed(happened.text)):
                    for told in self._tell(part):
                        yield told
            elif isinstance(happened, Ended):
                for part in self._wanted(self._parser.finish()):
                    for told in self._tell(part):
                        yield told
                for told in self._close():
                    yield told
                yield _event("message_delta", delta=self._ending(happened), usage=_usage(happened.stats))
                yield _event("message_stop")

    def _add(self, blocks: list[dict[str, Any]], parts: list[Part]) -> None:
        for part in self._wanted(parts):
            if isinstance(part, ToolCall):
                blocks.append({**_block(part), "input": json.loads(part.arguments)})
                continue
            name = "text" if isinstance(part, Text) else "thinking"
            if not blocks or blocks[-1]["type"] != name:
                blocks.append(_block(part))
            blocks[-1][name] += part.text

    def _tell(self, part: Part) -> Iterator[bytes]:
        """A part as events; its block is opened where there is none of its kind."""
        if isinstance(part, ToolCall) or self._open is not type(part):
            yield from self._close()
            self._open, self._index = type(part), self._index + 1
            yield _event("content_block_start", index=self._index, content_block=_block(part))
        if isinstance(part, ToolCall):
            delta = {"type": "input_json_delta", "partial_json": part.arguments}
        elif isinstance(part, Reasoning):
            delta = {"type": "thinking_delta", "thinking": part.text}
        else:
            delta = {"type": "text_delta", "text": part.text}
        yield _event("content_block_delta", index=self._index, delta=delta)

    def _close(self) -> Iterator[bytes]:
        if self._open is not None:
            yield _event("content_block_stop", index=self._index)
        self._open = None

    def _wanted(self, parts: list[Part]) -> Iterator[Part]:
        for part in parts:
            if isinstance(part, ToolCall):
                if self._one_call and self._called:
                    continue
                self._called = True
            yield part

    def _ending(self, ended: Ended) -> dict[str, Any]:
        if ended.reason == "length":
            reason = "max_tokens"
        elif ended.stop is not None:
            reason = "stop_sequence"
        else:
            reason = "tool_use" if self._called else "end_turn"
        return {"stop_reason": reason, "stop_sequence": ended.stop}


def _event(kind: str, **more: Any) -> bytes:
    return event({"type": kind, **more}, kind)


def _block(part: Part) -> dict[str, Any]:
    """A block before there is anything in it."""
    if isinstance(part, ToolCall):
        return {"type": "tool_use", "id": part.id.replace("call_", "toolu_"), "name": part.name, "input": {}}
    if isinstance(part, Reasoning):
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""}


def _usage(stats: DecodeStats) -> dict[str, int]:
    """Anthropic counts apart what was held from before."""
    return {
        "input_tokens": stats.prompt_tokens - stats.reused_tokens,
        "cache_read_input_tokens": stats.reused_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": stats.new_tokens,
    }
