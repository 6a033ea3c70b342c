"""Level 0 without a model: look-up in the text itself."""

from __future__ import annotations

import itertools

import numpy as np

from offload_triforce.speculation.acceptance import DraftToken
from offload_triforce.speculation.place import PathState
from offload_triforce.speculation.text import TokenText


class NgramDrafter:
    """The n-gram drafter: the text is taken to go on as it did after the longest earlier occurrence of its own ending.

    The search is a few vectorised comparisons over the whole text, so there is no index to keep or to roll back.
    """

    # Kinds of draft, by the tokens that match: up to so many.
    LENGTHS = (2, 4, 8, 16, 32)

    def __init__(self, vocabulary: int, shortest: int = 2, longest: int = 32) -> None:
        """``vocabulary``: V. ``shortest`` and ``longest``: tokens of the ending that are compared."""
        self.vocabulary, self.shortest, self.longest = vocabulary, shortest, longest
        self._next = 0

    def offer(self, text: TokenText) -> str | None:
        """See ``Drafter``: the longer the match, the surer the draft."""
        matched, self._next = longest_match(text.ids.numpy(), self.shortest, self.longest)
        if not matched:
            return None
        return f"ngram {next((n for n in self.LENGTHS if matched <= n), self.LENGTHS[-1])}"

    def draft(self, text: TokenText, count: int, before: PathState | None = None) -> list[DraftToken]:
        """See ``Drafter``."""
        follow = text[self._next : self._next + count]
        # A prompt may hold ids that a model reads but never says.
        return [DraftToken(token, None) for token in itertools.takewhile(lambda token: token < self.vocabulary, follow)]


def longest_match(ids: np.ndarray, shortest: int, longest: int) -> tuple[int, int]:
    """The longest earlier occurrence of the ending of ``ids``: its length, and where what followed it begins.

    Of several longest occurrences, the newest counts. Endings under ``shortest`` tokens do not count: (0, 0).
    """
    ends = np.flatnonzero(ids[:-1] == ids[-1])  # where an occurrence of the last token ends
    best, matched = ends[:0], 0
    for length in range(1, longest + 1):
        if length > 1:
            ends = ends[ends >= length - 1]
            ends = ends[ids[ends - length + 1] == ids[len(ids) - length]] if length <= len(ids) else ends[:0]
        if not len(ends):
            break
        if length >= shortest:
            best, matched = ends, length
    return (matched, int(best[-1]) + 1) if matched else (0, 0)
