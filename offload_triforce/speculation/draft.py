"""Level 0: whoever makes the first guess. A small model, look-up in the text itself, or nobody."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from offload_triforce.cache.static import StaticView
from offload_triforce.cache.streaming import StreamingCache
from offload_triforce.kernels.ops import Rule
from offload_triforce.model.adapter import run
from offload_triforce.model.graphs import StepGraphs
from offload_triforce.speculation.sampling import Choices, Sampler
from offload_triforce.speculation.text import TokenText


class NoDraft:
    """Never guesses."""

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        self._nothing = torch.empty(0, vocabulary, device=device)

    def propose(self, text: TokenText, limit: int) -> Tensor:
        """No guesses: [0, V]."""
        return self._nothing

    def keep(self, length: int) -> None:
        """Nothing is held."""


class NgramDraft(NoDraft):
    """Guesses that the text goes on as it did after the longest earlier occurrence of its own ending.

    The guess is certain of itself: its distribution has all mass on the token. The search is a few
    vectorised comparisons over the whole text, so there is no index to keep or to roll back.
    """

    def __init__(self, vocabulary: int, device: torch.device, shortest: int = 2, longest: int = 32) -> None:
        """``shortest`` and ``longest``: tokens of the ending that are compared, at least and at most."""
        super().__init__(vocabulary, device)
        self.shortest, self.longest = shortest, longest

    def propose(self, text: TokenText, limit: int) -> Tensor:
        """Append up to ``limit`` tokens; return one-hot rows, [k, V]."""
        vocabulary = self._nothing.shape[1]
        guess = longest_match(text.ids.numpy(), self.shortest, self.longest, limit)
        # A prompt may hold ids that a model reads but never says.
        guess = list(itertools.takewhile(lambda token: token < vocabulary, guess))
        text.append(guess)
        tokens = torch.as_tensor(guess, dtype=torch.long, device=self._nothing.device)
        return torch.nn.functional.one_hot(tokens, vocabulary).float()


def longest_match(ids: np.ndarray, shortest: int, longest: int, limit: int) -> list[int]:
    """What followed the longest earlier occurrence of the ending of ``ids``: at most ``limit`` tokens.

    Of several longest occurrences, the newest counts. Endings under ``shortest`` tokens do not count.
    """
    if limit < 1:
        return []
    ends = np.flatnonzero(ids[:-1] == ids[-1])  # where an occurrence of the last token ends
    best = ends[:0]
    for length in range(1, longest + 1):
        if length > 1:
            ends = ends[ends >= length - 1]
            ends = ends[ids[ends - length + 1] == ids[len(ids) - length]] if length <= len(ids) else ends[:0]
        if not len(ends):
            break
        if length >= shortest:
            best = ends
    return ids[best[-1] + 1 : best[-1] + 1 + limit].tolist() if len(best) else []


class ModelDraft:
    """A small transformers model over a streaming cache."""

    def __init__(
        self,
        model: PreTrainedModel,
        cache: StreamingCache,
        sampler: Sampler,
        choices: Choices,
        graphs: StepGraphs | None = None,
    ) -> None:
        self.model, self.cache, self.sampler, self.choices, self.graphs = model, cache, sampler, choices, graphs

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        """The view that the model attends over."""
        return self.cache.attend(layer, query, key, value, rule)

    def propose(self, text: TokenText, limit: int) -> Tensor:
        """Draw ``limit`` tokens one by one; return the distributions they were drawn from, [limit, V]."""
        rows = [torch.empty(0, self.sampler.vocabulary, device=self.model.device)]
        for _ in range(limit):
            row = self.sampler.distributions(self._read(text), text.ids, len(text))
            rows.append(row)
            text.append([self.choices.draw(row[0])])
        return torch.cat(rows)

    def _read(self, text: TokenText) -> Tensor:
        """Read what is unread of the text: logits after its last token, [1, V']."""
        cache = self.cache
        parts = [range(cache.text, len(text))] if cache.length else cache.begin(len(text))
        tokens = [token for part in parts for token in text[part.start : part.stop]]
        cache.settle(cache.pending - min(cache.pending, max(0, cache.text - text.decided)))
        cache.make_room(len(tokens))
        if self.graphs is None:
            logits = run(self.model, tokens, cache.length, self, keep=1)
        else:
            logits = self.graphs(tokens, cache.length, self, keep=1)
        cache.end_step(len(tokens))
        return logits

    def keep(self, length: int) -> None:
        """Forget everything after the first ``length`` tokens of the text."""
        self.cache.keep_pending(self.cache.pending - max(0, self.cache.text - length))


def static_view(cache: StreamingCache, tokens: int) -> StaticView:
    """What the draft attends over in steps of that many tokens that are captured."""
    return StaticView([cache], lambda layer, _: (cache, layer), tokens)
