"""A grammar library's matcher as a logits processor, with its state kept for each path of the tree."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from offload_triforce.errors import InputError

# What libraries call the same thing: xgrammar's name first, then llguidance's.
ACCEPT = ("accept_token", "consume_token")
FORK = ("fork", "deep_copy", "copy")
OVER = ("is_terminated", "is_stopped")
FILL = "fill_next_token_bitmask"
COMPUTE = "compute_bitmask"
ENDS = "stop_token_ids"
WORD = 32  # tokens per number of a bitmask


class GrammarProcessor(LogitsProcessor):
    """Rules out what a matcher does not allow to follow: for one answer, which begins where the prompt ends.

    >>> matcher = xgrammar.GrammarMatcher(compiler.compile_json_schema(schema))
    >>> grammar = GrammarProcessor(matcher, tokenizer_info.vocab_size)
    >>> engine.generate(prompt, logits_processor=[grammar])

    The target advances this object by each token of the text, and drafts advance forks of it: draft tokens keep to the
    grammar too, wherever they are in the tree. It works in ``generate`` of transformers as well.

    A matcher has (under the names that xgrammar or llguidance give them) ``accept_token(id) -> bool``; a copy,
    ``fork()``; ``is_terminated()``; and either ``fill_next_token_bitmask(bitmask, index)``, which writes to int32
    [1, ceil(tokens / 32)] on the CPU, or ``compute_bitmask() -> bytes``. Bit i of a mask's number j is token 32 j + i.

    Once the grammar has ended, its end tokens alone may follow: the matcher's ``stop_token_ids``, or what it goes on to
    compute. A matcher without either lets everything follow.
    """

    def __init__(self, matcher: Any, tokens: int) -> None:
        """``matcher``: at the beginning of its grammar. ``tokens``: in the vocabulary that it was made for.

        Raises:
            InputError: it lacks one of these methods.
        """
        self._tokens, self._read = tokens, -1
        self._words: Tensor | None = None  # what it allowed last
        self._take_over(matcher)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Ids [1, n] and scores [1, V] -> scores [1, V], -inf where the grammar does not allow a token.

        Raises:
            InputError: the text has left the grammar, or this object has served another one.
        """
        length = input_ids.shape[1]
        if len(input_ids) != 1 or length < self._read:
            raise InputError("a GrammarProcessor serves one text from its prompt to its end; make a new one for each")
        news = input_ids[0, self._read :].tolist() if self._read >= 0 else []
        for position, token in enumerate(news, max(self._read, 0)):
            self._advance(token, position)
        self._read, self._words = length, self._bitmask()
        if self._words is None:
            return scores
        if not bool(self._words.any()):
            raise InputError(f"the grammar allows no token after the first {length:,}")
        known = allowed(self._words.to(scores.device), self._tokens, scores.shape[1])
        return scores.masked_fill(~known, float("-inf"))

    def fork(self) -> GrammarProcessor:
        """A copy in the same state, which goes its own way."""
        twin = copy.copy(self)
        twin._take_over(self._fork())
        return twin

    def _take_over(self, matcher: Any) -> None:
        self._matcher = matcher
        self._accept, self._fork, self._over = (_method(matcher, names) for names in (ACCEPT, FORK, OVER))
        _method(matcher, (FILL, COMPUTE))

    def _advance(self, token: int, position: int) -> None:
        """The text goes on with a token at that position."""
        last, self._words = self._words, None
        # Matchers remember errors, and print them: what cannot be right, they are not told.
        possible = last is None or bool(allowed(last, self._tokens, token + 1)[0, token])
        if not possible or not (self._over() or self._accept(token)):
            raise InputError(f"the grammar does not allow token {token} at position {position:,} of the text")

    def _bitmask(self) -> Tensor | None:
        """What may follow, int32 [1, words] on the CPU; None for everything."""
        if not hasattr(self._matcher, FILL):
            return torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.int32)[None]
        words = torch.full((1, -(-self._tokens // WORD)), -1, dtype=torch.int32, device="cpu")
        if not self._over():
            self._matcher.fill_next_token_bitmask(words, 0)
            return words
        ends = getattr(self._matcher, ENDS, None)
        if not ends:
            return None
        bits = torch.zeros(words.shape[1] * WORD, dtype=torch.int32, device="cpu")
        bits[list(ends)] = 1
        return (bits.view(1, -1, WORD) << torch.arange(WORD, dtype=torch.int32)).sum(dim=2, dtype=torch.int32)


def allowed(words: Tensor, tokens: int, width: int) -> Tensor:
    """Bits as truth values: int32 [1, W] -> bool [1, width]. Nothing is allowed from ``tokens`` (or 32 W) on."""
    bits = (words[:, :, None] >> torch.arange(WORD, device=words.device, dtype=words.dtype)) & 1
    known = bits.flatten(1)[:, : min(tokens, width)].bool()
    return torch.nn.functional.pad(known, (0, width - known.shape[1]))


def _method(matcher: Any, names: tuple[str, ...]) -> Callable[..., Any]:
    """The first of these methods that there is."""
    for name in names:
        method = getattr(matcher, name, None)
        if callable(method):
            return method
    raise InputError(f"{type(matcher).__name__} is no matcher of a grammar: it has no {' or '.join(names)}")
