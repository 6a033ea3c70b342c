"""What the target gave to its tokens, in OpenAI's two shapes. It is the model's own distribution, before temperature,
penalties and the like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from offload_triforce.server.reporter import TokenLogprob

LEAST = -9999.0  # for a token that is as good as impossible: JSON has no infinity


def chat_logprobs(tokenizer: PreTrainedTokenizerBase, told: Sequence[TokenLogprob]) -> dict[str, Any]:
    """In the chat's shape."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = _text(tokenizer, token)
        return {"token": text, "logprob": max(logprob, LEAST), "bytes": list(text.encode("utf-8", "replace"))}

    content = [
        {**entry(each.token, each.logprob), "top_logprobs": [entry(*pair) for pair in each.top]} for each in told
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: PreTrainedTokenizerBase, told: Sequence[TokenLogprob], offset: int
) -> dict[str, Any]:
    """In the older shape of completions. ``offset``: characters that stand before."""
    tokens = [_text(tokenizer, each.token) for each in told]
    offsets = []
    for text in tokens:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": tokens,
        "token_logprobs": [max(each.logprob, LEAST) for each in told],
        "top_logprobs": [_by_text(tokenizer, each.top) for each in told],
        "text_offset": offsets,
    }


def _by_text(tokenizer: PreTrainedTokenizerBase, top: Sequence[tuple[int, float]]) -> dict[str, float]:
    """Best first. Tokens that are spelled alike, as parts of characters are, share a place: the best one's."""
    found: dict[str, float] = {}
    for token, value in top:
        found.setdefault(_text(tokenizer, token), max(value, LEAST))
    return found


def _text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    text: str = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
