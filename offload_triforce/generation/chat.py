"""The messages of a chat as a prompt, by the model's own template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from transformers import PreTrainedTokenizerBase

from offload_triforce.errors import InputError

Message = Mapping[str, Any]


def is_chat(prompt: object) -> TypeGuard[Sequence[Message]]:
    """Whether a prompt is a list of messages, be they as they should or not."""
    return isinstance(prompt, (list, tuple)) and any(isinstance(part, Mapping) for part in prompt)


def has_chat_format(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer has a chat template, or brings something in its place, as that of mistral-common does."""
    own = type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template
    return own or bool(tokenizer.chat_template)


def chat_ids(tokenizer: PreTrainedTokenizerBase | None, messages: Sequence[Message], **variables: Any) -> list[int]:
    """Token ids of messages in the model's chat format, up to where its answer begins.

    Args:
        tokenizer: with a chat template.
        messages: each with a "role" and a "content", a text or a list of parts ``{"type": "text", "text": ...}``, which
            become lines. If the last message is the assistant's, the answer continues it.
        variables: further ones of the template, such as ``tools`` or ``enable_thinking``.

    Raises:
        InputError: there is no template, a message is none, or the template refuses them.
    """
    if tokenizer is None:
        raise InputError("messages need a tokenizer with a chat template; pass token ids, or load one with the model")
    if not has_chat_format(tokenizer):
        raise InputError("this tokenizer has no chat template; give the prompt as text, or set tokenizer.chat_template")
    plain = [_plain(number, message) for number, message in enumerate(messages, 1)]
    if not plain:
        raise InputError("the messages hold nothing that could be answered")
    open_end = plain[-1]["role"] == "assistant"
    how = {"add_generation_prompt": not open_end, "continue_final_message": open_end}
    try:
        ids = tokenizer.apply_chat_template(plain, tokenize=True, return_dict=False, **how, **variables)
    except Exception as error:  # a template is a program of the model's: it may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"the model's chat template refuses these messages: {reason}") from error
    return [int(token) for token in ids]


def _plain(number: int, message: object) -> dict[str, Any]:
    """A message with its text in one piece: templates differ in what else they understand, and few say so."""
    if not isinstance(message, Mapping):
        raise InputError(f"message {number} must have a role and a content, not be {message!r}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise InputError(f"the role of message {number} must be a text such as 'user', not {role!r}")
    if isinstance(content, (list, tuple)):
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise InputError(f"message {number} has a part that is no text; only text can be read")
        content = "\n".join(texts)
    silent = content is None and message.get("tool_calls")
    if not isinstance(content, str) and not silent:
        raise InputError(f"the content of message {number} must be a text, not {content!r}")
    return {**message, "content": content}


PLAIN_STOP = "\nUser:"  # where an answer in the plain format ends, unless the model ends it


def plain_chat(messages: Sequence[Message]) -> str:
    """Messages as a text that any model can continue, for those that have no chat template."""
    names = {"user": "User: ", "assistant": "Assistant: "}
    turns = [f"{names.get(message['role'], '')}{message['content']}" for message in messages]
    return "\n\n".join([*turns, "Assistant:"])
