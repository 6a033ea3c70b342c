"""Level 0: whoever makes the first guess. A small model, or look-up in the text itself."""

from __future__ import annotations

import itertools
from typing import Protocol

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from offload_triforce.cache.static import Held, StaticView
from offload_triforce.cache.streaming import StreamingCache
from offload_triforce.kernels.ops import AttentionParams
from offload_triforce.model.adapter import run
from offload_triforce.model.graphs import StepGraphs
from offload_triforce.speculation.place import PathState, Place
from offload_triforce.speculation.rules import Guess, Rule
from offload_triforce.speculation.text import TokenText


class Draft(Protocol):
    """Somebody who guesses how a text goes on."""

    def offer(self, text: TokenText) -> str | None:
        """The kind of guess that can be made about this text, by how sure it is; None if none can."""

    def guess(self, text: TokenText, count: int, before: PathState | None = None) -> list[Guess]:
        """Up to ``count`` guesses about the text that ``offer`` has just seen. The text stays as it is.

        ``before``: of forkable logits processors, at the place before the text's last token; None where the target was.
        """


class NgramDraft:
    """Guesses that the text goes on as it did after the longest earlier occurrence of its own ending.

    The search is a few vectorised comparisons over the whole text, so there is no index to keep or to roll back.
    """

    # Kinds of guess, by the tokens that match: up to so many.
    LENGTHS = (2, 4, 8, 16, 32)

    def __init__(self, vocabulary: int, shortest: int = 2, longest: int = 32) -> None:
        """``vocabulary``: V. ``shortest`` and ``longest``: tokens of the ending that are compared."""
        self.vocabulary, self.shortest, self.longest = vocabulary, shortest, longest
        self._next = 0

    def offer(self, text: TokenText) -> str | None:
        """See ``Draft``: the longer the match, the surer the guess."""
        matched, self._next = longest_match(text.ids.numpy(), self.shortest, self.longest)
        if not matched:
            return None
        return f"ngram {next((n for n in self.LENGTHS if matched <= n), self.LENGTHS[-1])}"

    def guess(self, text: TokenText, count: int, before: PathState | None = None) -> list[Guess]:
        """See ``Draft``."""
        follow = text[self._next : self._next + count]
        # A prompt may hold ids that a model reads but never says.
        return [Guess(token, None) for token in itertools.takewhile(lambda token: token < self.vocabulary, follow)]


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


class ModelDraft:
    """A small transformers model over a streaming cache.

    The text may hold ids that this model has no embedding for (the target's vocabulary is padded further, or holds ids
    of images). Nothing is drafted right after one; later it reads another token in its place.
    """

    def __init__(
        self, model: PreTrainedModel, cache: StreamingCache, rule: Rule, graphs: StepGraphs | None = None
    ) -> None:
        """``cache`` must be empty. ``rule``: how it takes a token from its logits."""
        self.model, self.cache, self.rule, self.graphs = model, cache, rule, graphs
        self._readable = model.get_input_embeddings().num_embeddings
        self._stand_in = _stand_in(model, self._readable)
        self._read: list[int] = []  # tokens of the text that have been read or left out, from ``_first`` on
        self._first = 0

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """The view that the model attends over."""
        return self.cache.attend(layer, query, key, value, params)

    def _room(self, text: TokenText) -> int:
        """Guesses that the cache can hold beside those that are in the text already."""
        return self.cache.capacity // 2 - self.cache.sink - 1 - (len(text) - text.decided)

    def offer(self, text: TokenText) -> str | None:
        """See ``Draft``: a model can always guess, as long as there is room, and it knows the last token."""
        return "model" if self._room(text) > 0 and text[-1:][0] < self._readable else None

    def guess(self, text: TokenText, count: int, before: PathState | None = None) -> list[Guess]:
        """See ``Draft``: drawn one by one."""
        start, guesses = len(text), []
        state = PathState(before)
        for _ in range(min(count, self._room(text))):
            guess = self.rule.draft(self._logits(text), Place(text.ids_on, len(text), state))
            if guess is None:
                break
            guesses.append(guess)
            if guess.token >= self._readable:
                break
            text.append([guess.token])
            state = PathState(state)
        text.truncate(start)
        return guesses

    def _logits(self, text: TokenText) -> Tensor:
        """Read what is unread of the text: logits after its last token, [1, V']."""
        cache = self.cache
        if cache.length:
            self._forget_but(text)
        if cache.length and len(text) - cache.text <= cache.capacity // 2:
            parts = [range(cache.text, len(text))]
        else:  # at the beginning, or when nobody has asked for so long that little of what is held would stay
            parts = cache.begin(len(text))
            self._first = len(text) - 1
        ids = [token for part in parts for token in text[part.start : part.stop]]
        tokens = [token if token < self._readable else self._stand_in for token in ids]
        guesses = cache.text - (text.decided - 1)  # and the newest decided token, which may be asked about again
        cache.settle(cache.pending - min(cache.pending, max(0, guesses)))
        cache.make_room(len(tokens))
        positions = range(cache.length, cache.length + len(tokens))
        if self.graphs is None:
            logits = run(self.model, tokens, positions, self, keep=1)
        else:
            depths = range(cache.pending, cache.pending + len(tokens))
            seen = np.tri(len(tokens), dtype=bool)
            logits = self.graphs(tokens, positions, self, 1, seen, depths)
        cache.end_step(len(tokens))
        self._read = text[self._first :]
        return logits

    def _forget_but(self, text: TokenText) -> None:
        """Forget what has been read of another text than this one, and this one's last token, which is read again."""
        now, same = text[self._first : -1], 0
        for mine, its in zip(self._read, now, strict=False):
            if mine != its:
                break
            same += 1
        self.cache.keep_pending(self.cache.pending - max(0, self.cache.text - self._first - same))


def _stand_in(model: PreTrainedModel, readable: int) -> int:
    """What a model reads for ids that it does not know: the end of a text, if it knows that; else token 0."""
    ends = model.config.get_text_config().eos_token_id
    ends = ends if isinstance(ends, (list, tuple)) else [ends]
    return next((end for end in ends if end is not None and 0 <= end < readable), 0)


def static_view(cache: StreamingCache, tokens: int) -> StaticView:
    """What the draft attends over in steps of that many tokens that are captured."""
    return StaticView([cache], lambda layer, _: Held(None, cache, layer), tokens, tokens)
