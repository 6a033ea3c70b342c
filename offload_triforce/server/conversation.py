"""The messages of a chat, with tools and a shape for the answer, on the way to the engine."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from transformers import LogitsProcessor, PreTrainedTokenizerBase

from offload_triforce.server.answering import Question
from offload_triforce.server.errors import invalid, quote
from offload_triforce.server.prompting import ask, chat_prompt
from offload_triforce.server.replies import CALLING, THINKING, MarkParser, ReplyParser, ToolCall
from offload_triforce.server.sampling import Sampling
from offload_triforce.server.service import Service
from offload_triforce.server.structured import AfterReasoning
from offload_triforce.server.template_replies import TemplateParser, has_response_template

INSIDE = ("[ARGS]", "[CALL_ID]", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")  # of a call
ROLES = ("system", "user", "assistant", "tool")
TAIL = 1024  # tokens at the end of a prompt that say whether reasoning, or a part of the answer, has begun
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

    def parser(self, service: Service) -> ReplyParser:
        """What takes the answer apart."""
        if has_response_template(service.tokenizer):
            return TemplateParser(service.tokenizer, self.prompt_end, self.shown_tools)
        return MarkParser(self.prompt_end, self.shown_tools)

    def rendered(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Messages, and the other variables of the model's template.

        Raises:
            ApiError: what is wrong with them.
        """
        messages = [_message(number, message) for number, message in enumerate(self.messages, 1)]
        _check_tools(self)
        for name in self.variables:
            if name in _RESERVED:
                raise invalid(f"chat_template_kwargs: {name} is set by the server", "chat_template_kwargs")
        return messages, self.variables | ({"tools": self.shown_tools} if self.shown_tools else {})

    @property
    def shown_tools(self) -> list[dict[str, Any]]:
        """Tools that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools

    @property
    def forced_tools(self) -> list[dict[str, Any]]:
        """Tools of which the model has to call one; none if it may do as it likes."""
        if self.tool_choice == "required":
            return self.tools
        name = _chosen(self.tool_choice)
        return [tool for tool in self.tools if name is not None and tool["function"]["name"] == name]


def prepare(
    service: Service, conversation: Conversation, asked: Sampling, limit: int | None, top_logprobs: int | None
) -> Question:
    """A chat as the engine is asked. ``limit``: of new tokens.

    Raises:
        ApiError, InputError: what is wrong with it.
    """
    messages, variables = conversation.rendered()
    ids = chat_prompt(service, messages, variables)
    conversation.prompt_end = service.tokenizer.decode(ids[-TAIL:], skip_special_tokens=False)
    keep = kept_marks(service.tokenizer, bool(conversation.shown_tools))
    grammar = _grammar(service, conversation)
    return ask(service, ids, asked, limit, top_logprobs=top_logprobs, keep=keep, grammar=grammar)


def _grammar(service: Service, conversation: Conversation) -> LogitsProcessor | None:
    """What the answer has to keep to."""
    grammar = service.grammars.of_format(conversation.response_format)
    if conversation.forced_tools:
        if grammar is not None:
            raise invalid("response_format and a tool_choice that forces a call exclude each other", "tool_choice")
        template = str(service.tokenizer.chat_template)
        grammar = service.grammars.of_calls(conversation.forced_tools, template, partial(_reads, service))
    thinking = next((mark for mark in THINKING if conversation.prompt_end.rstrip().endswith(mark)), None)
    if grammar is None or thinking is None:
        return grammar
    close = service.tokenizer.encode(THINKING[thinking], add_special_tokens=False)
    if len(close) != 1:
        raise invalid(f"{THINKING[thinking]} is no single token of this model, so no grammar can follow its reasoning")
    return AfterReasoning(grammar, close[0])


def _reads(service: Service, text: str, tool: dict[str, Any]) -> bool:
    """Whether an answer would be taken for a call of a tool."""
    parser = Conversation([], [tool]).parser(service)
    return any(isinstance(part, ToolCall) for part in [*parser.feed(text), *parser.finish()])


def kept_marks(tokenizer: PreTrainedTokenizerBase, tools: bool) -> list[str]:
    """Special tokens that set the parts of an answer apart, and so have to be spelled."""
    marks = [*THINKING, *THINKING.values()]
    if tools:
        marks += [*CALLING, *filter(None, CALLING.values()), *INSIDE]
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {token.content for token in added.values() if token.special}
    if has_response_template(tokenizer):
        return sorted(special)  # any of them may be among its marks
    return [mark for mark in marks if mark in special]


def _message(number: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates know it: arguments of tools as objects, and no role that only OpenAI has."""
    role = message.get("role")
    role = "system" if role == "developer" else role
    if role not in ROLES:
        raise invalid(f"the role of message {number} must be one of {', '.join(ROLES)}, not {quote(role)}", "messages")
    plain = {name: value for name, value in message.items() if value is not None}
    if role in ("user", "system") and "content" not in plain:
        raise invalid(f"message {number} has no content: a text, or a list of texts", "messages")
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
        if not isinstance(function.get("parameters") or {}, dict):
            message = f"the parameters of tool {number} must be a JSON schema, not {quote(function['parameters'])}"
            raise invalid(message, "tools")
    choice = conversation.tool_choice
    if choice not in (None, "none", "auto", "required") and _chosen(choice) is None:
        message = f"tool_choice must be 'none', 'auto', 'required' or a function's name, not {quote(choice)}"
        raise invalid(message, "tool_choice")
    if (choice == "required" or isinstance(choice, dict)) and not conversation.forced_tools:
        raise invalid(
            f"tool_choice asks for {quote(_chosen(choice) or 'a call')}, and tools has no such tool", "tool_choice"
        )


def _chosen(choice: str | dict[str, Any] | None) -> str | None:
    """The function that a ``tool_choice`` names."""
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None
