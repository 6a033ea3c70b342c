"""Anthropic's way to ask: /v1/messages. Coding agents speak it."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from offload_triforce.server.about import body_of
from offload_triforce.server.answering import Question
from offload_triforce.server.asking import answer_to
from offload_triforce.server.bodies import Objects, Texts, parse
from offload_triforce.server.conversation import Conversation, prepare
from offload_triforce.server.errors import invalid, quote
from offload_triforce.server.message_blocks import as_openai, system_text
from offload_triforce.server.message_replies import Message
from offload_triforce.server.prompting import chat_prompt
from offload_triforce.server.sampling import HARMLESS, Sampling, check_stops
from offload_triforce.server.service import Service
from offload_triforce.server.streaming import EventStream, unless_gone

_HARMLESS = HARMLESS | {"container", "betas", "cache_control", "inference_geo"}


class MessagesRequest(Sampling):
    """A request for the next message of a chat, in Anthropic's shape."""

    messages: Annotated[Objects, Field(min_length=1)]
    system: str | Objects | None = None
    stop_sequences: Texts | None = None
    tools: Objects | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    context_management: dict[str, Any] | None = None

    def stops(self) -> list[str]:
        """See ``Sampling``."""
        return [*super().stops(), *check_stops("stop_sequences", self.stop_sequences or [])]

    def conversation(self) -> Conversation:
        """What the model's template is given.

        Raises:
            ApiError: what is wrong with it.
        """
        self.check_unknown(_HARMLESS)
        self.check_one()
        self._check_changes()
        messages = as_openai(self.messages)
        if self.system:
            messages.insert(0, {"role": "system", "content": system_text(self.system)})
        choice, one_call = _choice(self.tool_choice)
        variables = {} if self.thinking is None else {"enable_thinking": _thinks(self.thinking)}
        tools = [_tool(number, tool) for number, tool in enumerate(self.tools or [], 1)]
        return Conversation(messages, tools, choice, one_call, variables=variables)

    def _check_changes(self) -> None:
        """Refuse what would change the prompt or the answer, and is not done here.

        Raises:
            ApiError: names it.
        """
        if self.output_config and self.output_config.get("format") is not None:
            raise invalid(
                "output_config.format is not supported here; ask for a shape by a tool and tool_choice, or by "
                "response_format of /v1/chat/completions",
                "output_config",
            )
        edits = (self.context_management or {}).get("edits") or []
        if not isinstance(edits, list) or any(not isinstance(e, dict) or e.get("keep") != "all" for e in edits):
            raise invalid(
                "context_management.edits would change the prompt, and no edit but one that keeps all is possible",
                "context_management",
            )


def message_routes(service: Service) -> APIRouter:
    """The paths."""
    router = APIRouter()

    @router.post("/v1/messages")
    async def messages(request: Request) -> Response:
        def question(asked: MessagesRequest) -> tuple[Conversation, Question]:
            if asked.max_tokens is None:
                raise invalid("max_tokens is missing: most tokens of the answer", "max_tokens")
            conversation = asked.conversation()
            return conversation, prepare(service, conversation, asked, asked.max_tokens, None)

        asked, model, conversation, answering = await answer_to(service, request, MessagesRequest, question)
        message = Message(service, model, conversation, answering)
        if asked.stream:
            return EventStream(message.stream(), answering.cancel, service.options.ping_seconds, anthropic=True)
        return JSONResponse(await unless_gone(request, message.whole()))

    @router.post("/v1/messages/count_tokens")
    async def count_tokens(request: Request) -> dict[str, int]:
        body = await body_of(service, request)

        def count() -> int:
            asked = parse(MessagesRequest, body)
            service.check_model(asked.model)
            return len(chat_prompt(service, *asked.conversation().rendered()))

        return {"input_tokens": await asyncio.to_thread(count)}

    return router


def _choice(choice: dict[str, Any] | None) -> tuple[str | dict[str, Any] | None, bool]:
    """Anthropic's ``tool_choice`` as OpenAI's, and whether one call at most is wanted."""
    if choice is None:
        return None, False
    one_call, kind = choice.get("disable_parallel_tool_use") is True, choice.get("type")
    if kind == "tool":
        name = choice.get("name")
        if not isinstance(name, str):
            raise invalid(f"tool_choice.name must be the name of a tool, not {quote(name)}", "tool_choice")
        return {"type": "function", "function": {"name": name}}, one_call
    names = {"auto": "auto", "any": "required", "none": "none"}
    if not isinstance(kind, str) or kind not in names:
        raise invalid(f"tool_choice.type must be auto, any, tool or none, not {quote(kind)}", "tool_choice")
    return names[kind], one_call


def _thinks(thinking: dict[str, Any]) -> bool:
    """Whether the model is to think; for how long is its own affair."""
    kind = thinking.get("type")
    if kind not in ("enabled", "adaptive", "disabled"):
        raise invalid(f"thinking.type must be enabled, adaptive or disabled, not {quote(kind)}", "thinking")
    return bool(kind != "disabled")


def _tool(number: int, tool: dict[str, Any]) -> dict[str, Any]:
    name, schema = tool.get("name"), tool.get("input_schema")
    if tool.get("type") not in (None, "custom") or not isinstance(name, str) or not isinstance(schema, dict):
        raise invalid(
            f"tool {number} must have a name and an input_schema; Anthropic's own tools are not here", "tools"
        )
    function = {"name": name, "description": str(tool.get("description") or ""), "parameters": schema}
    return {"type": "function", "function": function}
