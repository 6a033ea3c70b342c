"""Text out of tokens while they come."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


class Detokenizer:
    """Decodes a growing token sequence piece by piece; the pieces concatenate to the decoded whole.

    Decodes from a little before the new tokens, since how a token is spelled may depend on the one before it, and
    holds back bytes that do not make a character yet.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: int = 8) -> None:
        """``context``: tokens to decode again along with the new ones."""
        self._tokenizer, self._context = tokenizer, context
        self._tokens: list[int] = []
        self._said = 0  # tokens whose text is out

    def push(self, tokens: Sequence[int], last: bool = False) -> str:
        """New tokens in, the text that they complete out. ``last``: hold nothing back."""
        self._tokens.extend(tokens)
        start = max(0, self._said - self._context)
        before = self._decode(self._tokens[start : self._said])
        now = self._decode(self._tokens[start:])
        if now.endswith("\N{REPLACEMENT CHARACTER}") and not last:
            return ""
        self._said = len(self._tokens)
        return now[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
