"""Text of an answer as a client gets it: without what ends it, and no sooner than it is certain."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from transformers import PreTrainedTokenizerBase

from offload_triforce.generation.detokenize import Detokenizer, decode_text


class StopWatch:
    """Looks for stop strings in a growing text. What might be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found: str | None = None  # the one that ended the text

    def push(self, text: str, last: bool = False) -> str:
        """More text in; what is certain comes out, up to the first stop string. ``last``: nothing follows."""
        if self.found is not None:
            return ""
        whole = self._held + text
        places = [(place, stop) for stop in self._stops if (place := whole.find(stop)) >= 0]
        if places:
            place, self.found = min(places, key=lambda found: (found[0], -len(found[1])))
            return whole[:place]
        held = 0 if last else max((overlap(whole, stop) for stop in self._stops), default=0)
        self._held = whole[len(whole) - held :]
        return whole[: len(whole) - held]


def overlap(text: str, stop: str) -> int:
    """The most characters at the end of ``text`` that ``stop`` begins with, but for all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Speller:
    """Tokens in, text out."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, ends: frozenset[int], stops: Sequence[str], keep: Sequence[str] = ()
    ) -> None:
        """``ends``: tokens that end a text. ``stops``: texts that do. ``keep``: special tokens that are spelled."""
        self.watch, self._ends = StopWatch(stops), ends
        self._silent = special_ids(tokenizer) - set(tokenizer.convert_tokens_to_ids(list(keep))) if keep else set()
        whole = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        self._detokenizer = Detokenizer(tokenizer, whole if keep else partial(decode_text, tokenizer))

    def push(self, token: int) -> str:
        """The text that a token completes."""
        if token in self._ends or token in self._silent:
            return ""
        return self.watch.push(self._detokenizer.push([token]))

    def finish(self) -> str:
        """The rest."""
        rest = self.watch.push(self._detokenizer.push([], last=True))
        return rest + self.watch.push("", last=True)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that are not spelled."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
