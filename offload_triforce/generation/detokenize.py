"""Text out of tokens while they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
CONTEXT = 8  # tokens that are decoded again along with the new ones, at least


def decode_text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """The text of an answer's tokens, by themselves: special tokens left out, spaces as the tokens spell them."""
    text: str = tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


class Detokenizer:
    """Decodes a growing token sequence piece by piece; the pieces concatenate to the decoded whole, wherever it ends.

    How a token is spelled depends on its neighbours:

    - On those before it: a text's first space is dropped, a word piece gets a space unless it is the first. So the
      tokens are decoded from a little before the new ones.
    - On those behind it: the bytes of a character may come in several tokens. And with byte fallback (Llama 2, Mistral,
      Phi-3, Gemma) a run of byte tokens is spelled as a whole: where its last character is not complete, each
      byte of the run becomes a replacement character, those of its complete characters too. What may still change in
      these ways is held back; all other text comes out with its token.

    No decoder of the ``tokenizers`` library changes its text in any other way. Should one from elsewhere (as of CTRL,
    whose "@@" is taken back when the next token comes), then what has been said stays said, and ``Generation.text``
    is right.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, decode: Callable[[Sequence[int]], str] | None = None
    ) -> None:
        """``decode``: another way from tokens to text than ``decode_text``."""
        self._decode = decode or partial(decode_text, tokenizer)
        self._tokens: list[int] = []
        self._start = 0  # of the tokens that are decoded again
        self._said = 0  # characters of their text that are out
        self._spoiler = _byte_token(tokenizer)

    def push(self, tokens: Sequence[int], last: bool = False) -> str:
        """New tokens in, the text that they complete out. ``last``: hold nothing back."""
        self._tokens.extend(tokens)
        text = self._decode(self._tokens[self._start :])
        final = len(text) if last else self._final(text)
        piece = text[self._said : final]
        self._said = max(self._said, final)
        if self._said == len(text):
            self._move_on()
        return piece

    def _final(self, text: str) -> int:
        """How many characters of ``text`` stay as they are, whatever comes.

        A byte that completes no character is put behind it for a try: if there is a run of bytes at the end, that
        spoils it as much as anything could.
        """
        if self._spoiler is not None:
            spoiled = self._decode([*self._tokens[self._start :], self._spoiler])
            text = text[: sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, spoiled, strict=False)))]
        return len(text.rstrip(REPLACEMENT))

    def _move_on(self) -> None:
        """All text is out: from now on, decode from a little before here.

        There has to be some text in what is decoded again, else the next token would look like the first of all.
        """
        reach = CONTEXT
        while True:
            self._start = max(0, len(self._tokens) - reach)
            text = self._decode(self._tokens[self._start :])
            if text or self._start == 0:
                break
            reach *= 2
        self._said = len(text)


def _byte_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """A token that stands for one byte, of those that are no ASCII character; None without byte fallback."""
    fast = getattr(tokenizer, "backend_tokenizer", None)  # it need not list the whole vocabulary
    find = fast.token_to_id if fast is not None else tokenizer.get_vocab().get
    found = (find(f"<0x{byte:02X}>") for byte in range(0xFF, 0x7F, -1))
    return next((token for token in found if token is not None), None)
