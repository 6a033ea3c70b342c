"""Logits processors that keep a state, and some that reject: what a user might bring along."""

from __future__ import annotations

import copy

import torch
from transformers import LogitsProcessor

from offload_triforce import stateless


class Counting(LogitsProcessor):
    """Allows two halves of the vocabulary in turn, by the number of its calls. Notes what it was called with."""

    def __init__(self):
        self.calls = 0
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids[0].tolist())
        self.calls += 1
        half = scores.shape[1] // 2
        scores[:, slice(0, half) if self.calls % 2 else slice(half, None)] = -torch.inf
        return scores


class Forking(Counting):
    """The same, with a copy for whoever asks."""

    def fork(self):
        twin = copy.copy(self)
        twin.seen = list(self.seen)
        return twin


class Moody(LogitsProcessor):
    """Rules out what had the best score last time: its state comes from the scores, not from the text alone."""

    triforce_forkable = True

    def __init__(self):
        self.last = []

    def __call__(self, input_ids, scores):
        best = int(scores.argmax())
        scores[:, self.last] = -torch.inf
        self.last = [best]
        return scores


class Sequence:
    """A ``prefix_allowed_tokens_fn`` that allows the tokens of a list, one by one, and nothing off its path."""

    def __init__(self, start, tokens):
        """``start``: length of the prompt."""
        self.start, self.tokens = start, tokens

    def __call__(self, batch_id, input_ids):
        said = input_ids[self.start :].tolist()
        return self.tokens[len(said) : len(said) + 1] if said == self.tokens[: len(said)] else []


class Successor:
    """A ``prefix_allowed_tokens_fn`` by the number of its calls: it does not keep to the contract."""

    def __init__(self):
        self.calls = 0

    def __call__(self, batch_id, input_ids):
        self.calls += 1
        return list(range(3 + 7 * (self.calls % 5), 40 + 7 * (self.calls % 5)))


class ForkingSuccessor(Successor):
    """The same, with a copy for whoever asks."""

    def fork(self):
        return copy.copy(self)


@stateless
class Fussy(LogitsProcessor):
    """Without a state, but not for every path: three odd tokens in a row are an error, or leave nothing to say."""

    def __init__(self, how):
        """``how``: "raises", "nothing", "nan", "infinite" or "shape"."""
        self.how = how

    def __call__(self, input_ids, scores):
        odd = input_ids[0, -3:] % 2
        if int(odd.sum()) == 3:
            return self.reject(scores)
        if int(odd[-2:].sum()) == 2:  # so that the text itself does not come there
            scores[:, 1::2] = -torch.inf
        return scores

    def reject(self, scores):
        if self.how == "raises":
            raise ValueError("three in a row")
        if self.how == "shape":
            return scores[:, :5]
        return torch.full_like(scores, {"nothing": -torch.inf, "nan": torch.nan, "infinite": torch.inf}[self.how])
