"""The messages of a chat, with tools and a shape for the answer, on the way to the engine."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from offload_triforce.server.answering import Question
from offload_triforce.server.errors import invalid, quote
from offload_triforce.server.prompting import ask, chat_prompt
from offload_triforce.server.replies import CALLING, THINKING, MarkParser, ReplyParser
from offload_triforce.server.sampling import Sampling
from offload_triforce.server.service import Service

ROLES = ("system", "user", "assistant", "tool")
TAIL = 64  # tokens at the end of a prompt that say whether reasoning has begun
_RESERVED = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"}


@dataclass
class Conversation:
    """A chat.

    Attributes:
        messages, tools, tool_choice, response_format: in OpenAI's shape. one_call: at most one call of a tool.
        variables: further ones of the model's template.
        prompt_end: the end of the prompt, once there is one.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = field(default_factory=list)
    tool_choice: str | dict[str, Any] | None = None
    one_call: bool = False
    response_format: dict[str, Any] | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    prompt_end: str = ""

    def parser(self) -> ReplyParser:
        """What takes the answer apart."""
        return MarkParser(self.prompt_end, bool(self.shown_tools))

    @property
    def shown_tools(self) -> list[dict[str, Any]]:
        """Tools that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools


def prepare(
    service: Service, conversation: Conversation, asked: Sampling, limit: int | None, top_logprobs: int | None
) -> Question:
    """A chat as the engine is asked. ``limit``: of new tokens.

    Raises:
        ApiError, InputError: what is wrong with it.
    """
    messages = [_message(number, message) for number, message in enumerate(conversation.messages, 1)]
    _check_tools(conversation)
    for name in conversation.variables:
        if name in _RESERVED:
            raise invalid(f"chat_template_kwargs: {name} is set by the server", "chat_template_kwargs")
    variables = dict(conversation.variables)
    if conversation.shown_tools:
        variables["tools"] = conversation.shown_tools
    if conversation.response_format not in (None, {"type": "text"}):
        raise invalid("response_format is not supported yet; leave it out", "response_format")
    ids = chat_prompt(service, messages, **variables)
    conversation.prompt_end = service.tokenizer.decode(ids[-TAIL:], skip_special_tokens=False)
    keep = kept_marks(service.tokenizer, bool(conversation.shown_tools))
    return ask(service, ids, asked, limit, top_logprobs=top_logprobs, keep=keep)


def kept_marks(tokenizer: PreTrainedTokenizerBase, tools: bool) -> list[str]:
    """Special tokens that set the parts of an answer apart, and so have to be spelled."""
    marks = [*THINKING, *THINKING.values()]
    if tools:
        marks += [*CALLING, *filter(None, CALLING.values()), "[ARGS]", "[CALL_ID]"]
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {token.content for token in added.values() if token.special}
    return [mark for mark in marks if mark in special]


def _message(number: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates know it: arguments of tools as objects, and no role that only OpenAI has."""
    role = message.get("role")
    role = "system" if role == "developer" else role
    if role not in ROLES:
        raise invalid(f"the role of message {number} must be one of {', '.join(ROLES)}, not {quote(role)}", "messages")
    plain = {name: value for name, value in message.items() if value is not None}
    if not isinstance(plain.get("content", ""), (str, list)):
        raise invalid(f"the content of message {number} must be a text, not {quote(plain['content'])}", "messages")
    plain |= {"role": role, "content": plain.get("content", "")}
    if isinstance(plain["content"], list):
        plain["content"] = _text(number, plain["content"])
    if (calls := plain.pop("tool_calls", None)) is not None:
        if not isinstance(calls, list) or not all(_is_call(call) for call in calls):
            raise invalid(f"the tool_calls of message {number} must be a list of function calls", "messages")
        plain["tool_calls"] = [_call(call) for call in calls]
    return plain


def _text(number: int, parts: list[Any]) -> str:
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in ("text", "refusal") or not isinstance(part.get(kind), str):
            raise invalid(f"message {number} has a part of type {quote(kind)}; only text can be read", "messages")
        texts.append(part[kind])
    return "\n".join(texts)


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str):
        with contextlib.suppress(ValueError, RecursionError):  # then as it is: the template may know what to do
            function["arguments"] = json.loads(function["arguments"] or "{}")
    return {**call, "type": "function", "function": function}


def _check_tools(conversation: Conversation) -> None:
    """Refuse what are no tools.

    Raises:
        ApiError: which.
    """
    for number, tool in enumerate(conversation.tools, 1):
        function = tool.get("function")
        if (
            tool.get("type") != "function"
            or not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
        ):
            raise invalid(f"tool {number} must be a function with a name; there are no others here", "tools")
    choice = conversation.tool_choice
    if choice not in (None, "none", "auto"):
        raise invalid(f"tool_choice must be 'auto' or 'none', not {quote(choice)}", "tool_choice")
