"""Messages in Anthropic's shape, which are made of blocks, as OpenAI has them."""

from __future__ import annotations

from typing import Any

from offload_triforce.server.errors import invalid, quote


def system_text(system: str | list[dict[str, Any]]) -> str:
    """The system prompt."""
    return system if isinstance(system, str) else _texts("system", system)


def as_openai(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same messages: results of tools as messages of their own, calls of tools beside the text.

    Raises:
        ApiError: a block that is none, or that cannot be read here.
    """
    plain: list[dict[str, Any]] = []
    for number, message in enumerate(messages, 1):
        role, content = message.get("role"), message.get("content")
        where = f"message {number}"
        if role not in ("user", "assistant", "system"):
            raise invalid(f"the role of {where} must be user or assistant, not {quote(role)}", "messages")
        if isinstance(content, str):
            plain.append({"role": role, "content": content})
        elif isinstance(content, list):
            plain += _answer(where, content) if role == "assistant" else _question(where, str(role), content)
        else:
            raise invalid(
                f"the content of {where} must be a text or a list of blocks, not {quote(content)}", "messages"
            )
    return plain


def _question(where: str, role: str, blocks: list[Any]) -> list[dict[str, Any]]:
    """Results of tools first, in their order: they answer what has been asked before."""
    results, texts = [], []
    for block in blocks:
        if _kind(where, block) == "tool_result":
            content = block.get("content") or ""
            text = content if isinstance(content, str) else _texts(where, content)
            results.append({"role": "tool", "tool_call_id": str(block.get("tool_use_id")), "content": text})
        else:
            texts.append(block)
    return results + ([{"role": role, "content": _texts(where, texts)}] if texts else [])


def _answer(where: str, blocks: list[Any]) -> list[dict[str, Any]]:
    texts, calls, thoughts = [], [], ""
    for block in blocks:
        kind = _kind(where, block)
        if kind == "tool_use":
            name, arguments = block.get("name"), block.get("input")
            if not isinstance(name, str) or not isinstance(arguments, dict):
                raise invalid(f"{where} has a tool_use without a name and an input", "messages")
            function = {"name": name, "arguments": arguments}
            calls.append({"id": str(block.get("id")), "type": "function", "function": function})
        elif kind == "thinking":
            thoughts += str(block.get("thinking") or "")
        elif kind != "redacted_thinking":
            texts.append(block)
    message: dict[str, Any] = {"role": "assistant", "content": _texts(where, texts)}
    message |= {"reasoning_content": thoughts} if thoughts else {}
    return [message | ({"tool_calls": calls} if calls else {})]


def _kind(where: str, block: Any) -> str:
    kind = block.get("type") if isinstance(block, dict) else None
    if not isinstance(kind, str):
        raise invalid(f"{where} has a block without a type: {quote(block)}", "messages")
    return kind


def _texts(where: str, blocks: Any) -> str:
    if not isinstance(blocks, list):
        raise invalid(f"{where} has {quote(blocks)} where blocks should be", "messages")
    texts = []
    for block in blocks:
        kind = _kind(where, block)
        if kind != "text" or not isinstance(block.get("text"), str):
            raise invalid(f"{where} has a block of type {quote(kind)}; only text can be read", "messages")
        texts.append(block["text"])
    return "\n".join(texts)
