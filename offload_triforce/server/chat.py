"""OpenAI's chat: /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, Field

from offload_triforce.server.answering import Answering, Question
from offload_triforce.server.asking import answer_to
from offload_triforce.server.bodies import Body, Objects, Texts
from offload_triforce.server.conversation import Conversation, prepare
from offload_triforce.server.errors import invalid, quote
from offload_triforce.server.logprobs import chat_logprobs
from offload_triforce.server.replies import Part, Reasoning, Text, ToolCall, text_of
from offload_triforce.server.reporter import Ended, Progress, Said
from offload_triforce.server.sampling import HARMLESS, Sampling
from offload_triforce.server.service import Service
from offload_triforce.server.shapes import new_id, progress, usage
from offload_triforce.server.streaming import DONE, EventStream, event, unless_gone

MOST_LOGPROBS = 20


class StreamOptions(Body):
    """What a stream brings beside the text."""

    include_usage: bool | None = None


def _check_variables(variables: dict[str, Any]) -> dict[str, Any]:
    for name, value in variables.items():
        if not isinstance(value, (str, bool, int, type(None))):
            raise ValueError(f"{quote(name)} must be a text, a whole number, true, false or null, not {quote(value)}")
    return variables


class ChatRequest(Sampling):
    """A request for the next message of a chat."""

    messages: Annotated[Objects, Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1, lt=2**40)] = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MOST_LOGPROBS)] = None
    tools: Objects | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_check_variables)] | None = None
    return_progress: bool | None = None
    modalities: Texts | None = None

    def check(self) -> None:
        """Refuse what this server cannot do.

        Raises:
            ApiError: names it.
        """
        self.check_unknown(HARMLESS)
        self.check_one()
        if self.modalities not in (None, ["text"]):
            raise invalid("modalities must be ['text']: this server answers in nothing else", "modalities")
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs needs logprobs: true", "top_logprobs")

    def conversation(self) -> Conversation:
        """What the model's template is given."""
        return Conversation(
            messages=self.messages,
            tools=self.tools or [],
            tool_choice=self.tool_choice,
            one_call=self.parallel_tool_calls is False,
            response_format=self.response_format,
            variables={
                **({"reasoning_effort": self.reasoning_effort} if self.reasoning_effort else {}),
                **(self.chat_template_kwargs or {}),
            },
        )


@dataclass
class Chat:
    """One answer in the shape of OpenAI's chat."""

    service: Service
    asked: ChatRequest
    model: str
    conversation: Conversation
    answering: Answering

    def __post_init__(self) -> None:
        self._about = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": self.model}
        self._called = 0

    async def whole(self) -> dict[str, Any]:
        """The answer, when it is complete."""
        parser, parts, logprobs, ended = self.conversation.parser(self.service), [], [], None
        async for happened in self.answering.events():
            if isinstance(happened, Said):
                parts += self._taken(parser.feed(happened.text))
                logprobs += happened.logprobs
            elif isinstance(happened, Ended):
                parts += self._taken(parser.finish())
                ended = happened
        assert ended is not None
        calls = [_tool_call(part) for part in parts if isinstance(part, ToolCall)]
        content, reasoning = text_of(parts, Text), text_of(parts, Reasoning)
        message: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None}
        message |= {"reasoning_content": reasoning} if reasoning else {}
        message |= {"tool_calls": calls} if calls else {}
        told = chat_logprobs(self.service.tokenizer, logprobs) if self.asked.logprobs else None
        choice = {"index": 0, "message": message, "logprobs": told, "finish_reason": self._reason(ended)}
        return {**self._about, "object": "chat.completion", "choices": [choice], "usage": usage(ended.stats)}

    async def stream(self) -> AsyncIterator[bytes]:
        """The answer as it comes."""
        parser = self.conversation.parser(self.service)
        yield self._chunk({"role": "assistant", "content": ""})
        async for happened in self.answering.events():
            if isinstance(happened, Progress) and self.asked.return_progress:
                yield self._chunk({}, prompt_progress=progress(happened))
            elif isinstance(happened, Said):
                deltas = list(self._deltas(parser.feed(happened.text)))
                told = None
                if self.asked.logprobs and happened.logprobs:
                    told = chat_logprobs(self.service.tokenizer, happened.logprobs)
                    deltas = deltas or [{}]
                for number, delta in enumerate(deltas):
                    yield self._chunk(delta, logprobs=None if number else told)
            elif isinstance(happened, Ended):
                for delta in self._deltas(parser.finish()):
                    yield self._chunk(delta)
                yield self._chunk({}, self._reason(happened))
                if self._wants_usage:
                    yield event({**self._about, "object": _CHUNK, "choices": [], "usage": usage(happened.stats)})
        yield DONE

    @property
    def _wants_usage(self) -> bool:
        return bool(self.asked.stream_options and self.asked.stream_options.include_usage)

    def _chunk(self, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        more |= {"usage": None} if self._wants_usage else {}
        return event({**self._about, "object": _CHUNK, "choices": [choice], **more})

    def _deltas(self, parts: list[Part]) -> Iterator[dict[str, Any]]:
        before = self._called
        for part in self._taken(parts):
            if isinstance(part, ToolCall):
                yield {"tool_calls": [{"index": before, **_tool_call(part)}]}
                before += 1
            else:
                yield {"content" if isinstance(part, Text) else "reasoning_content": part.text}

    def _taken(self, parts: list[Part]) -> list[Part]:
        """Without calls beyond the first, where only one is wanted."""
        taken: list[Part] = []
        for part in parts:
            if isinstance(part, ToolCall):
                if self.conversation.one_call and self._called:
                    continue
                self._called += 1
            taken.append(part)
        return taken

    def _reason(self, ended: Ended) -> str:
        return "tool_calls" if self._called and ended.reason == "stop" else ended.reason


_CHUNK = "chat.completion.chunk"


def _tool_call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def chat_routes(service: Service) -> APIRouter:
    """The paths."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def completions(request: Request) -> Response:
        def question(asked: ChatRequest) -> tuple[Conversation, Question]:
            asked.check()
            conversation = asked.conversation()
            top = (asked.top_logprobs or 0) if asked.logprobs else None
            limit = asked.max_completion_tokens or asked.max_tokens
            return conversation, prepare(service, conversation, asked, limit, top)

        asked, model, conversation, answering = await answer_to(service, request, ChatRequest, question)
        chat = Chat(service, asked, model, conversation, answering)
        if asked.stream:
            return EventStream(chat.stream(), answering.cancel, service.options.ping_seconds)
        return JSONResponse(await unless_gone(request, chat.whole()))

    return router
