"""Level 0 with the target's own multi-token-prediction head."""

from __future__ import annotations

import torch
from torch import Tensor

from offload_triforce.cache.hidden import HiddenWindow
from offload_triforce.cache.streaming import StreamingCache
from offload_triforce.kernels.ops import AttentionParams
from offload_triforce.model.mtp import MtpHead
from offload_triforce.speculation.acceptance import AcceptanceRule, DraftToken
from offload_triforce.speculation.place import PathState, Place
from offload_triforce.speculation.text import TokenText


class MtpDrafter:
    """The MTP drafter: one layer over a streaming cache, from the target's hidden states.

    What the head reads is pairs: pair n is the hidden state of token n and the token n + 1 itself. The hidden states of
    decided tokens are the target's, those of draft tokens in the tree the retrieval level's, and behind them the head's
    own. Only pairs of decided tokens stay in the cache; the others are read again with better ones.
    """

    def __init__(self, head: MtpHead, cache: StreamingCache, hidden: HiddenWindow, rule: AcceptanceRule) -> None:
        """``cache`` must be empty. ``hidden``: of the target's caches. ``rule``: takes a token from logits."""
        self.head, self.cache, self.hidden, self.rule = head, cache, hidden, rule
        self._readable = head.model.get_input_embeddings().num_embeddings

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """The view that the head attends over."""
        return self.cache.attend(layer, query, key, value, params)

    def _room(self, text: TokenText) -> int:
        """Draft tokens that the cache can hold beside the newest decided pair and those in the text already."""
        return self.cache.capacity // 2 - self.cache.sink - 2 - (len(text) - text.decided)

    def offer(self, text: TokenText) -> str | None:
        """See ``Drafter``: where there is room, the last token can be read, and the hidden state before it is known."""
        newest = text.decided - 2  # the last pair of decided tokens
        known = newest >= 0 and self.hidden.length == newest + 1 and self.hidden.has(range(newest, newest + 1))
        return "mtp" if known and self._room(text) > 0 and text[-1:][0] < self._readable else None

    def draft(self, text: TokenText, count: int, before: PathState | None = None) -> list[DraftToken]:
        """See ``Drafter``: drawn one by one. None at all where the retrieval level's hidden states are missing."""
        path = _hidden_along(before, len(text) - text.decided)
        if path is None:
            return []
        start, drafted, state = len(text), [], PathState(before)
        count = min(count, self._room(text))
        tokens, hidden, decided = self._unread(text, path)
        while len(drafted) < count:
            logits, hidden = self._read(tokens, hidden)
            self.cache.settle(decided)
            decided = 0
            draft_token = self.rule.draft(logits, Place(text.ids_on, len(text), state))
            if draft_token is None:
                break
            drafted.append(draft_token)
            if draft_token.token >= self._readable:
                break
            text.append([draft_token.token])
            tokens, hidden, state = [draft_token.token], hidden[-1:], PathState(state)
        text.truncate(start)
        self.cache.select([])
        return drafted

    def _unread(self, text: TokenText, path: list[Tensor]) -> tuple[list[int], Tensor, int]:
        """The pairs that are still to be read: their tokens, hidden states [n, width], and how many of them may stay.

        The newest decided pair is always read again: what comes after it is asked for.
        """
        pairs, cache = len(text) - 1, self.cache
        newest = text.decided - 2
        parts = [range(cache.text, newest + 1)]
        if not cache.length or pairs - cache.text > cache.capacity // 2 or not self.hidden.has(parts[0]):
            parts = self._begin(pairs, newest)
        tokens = [token for part in parts for token in text[part.start + 1 : part.stop + 1]]
        tokens += text[newest + 2 :]
        rows = [self.hidden.rows(part) for part in parts]
        if path:
            rows.append(torch.stack(path).to(rows[0].dtype))
        return tokens, torch.cat(rows), sum(map(len, parts)) - 1

    def _begin(self, pairs: int, newest: int) -> list[range]:
        """Start on a text of so many pairs: which of the decided ones are to be read, in order."""
        parts = self.cache.begin(pairs)
        parts[-1] = range(parts[-1].start, newest + 1)
        if not all(map(self.hidden.has, parts)):  # a text whose beginning was not read here
            first = min(newest, max(parts[-1].start, self.hidden.oldest))
            self.cache.reset()
            self.cache.skipped = first
            parts = [range(first, newest + 1)]
        return parts

    def _read(self, tokens: list[int], hidden: Tensor) -> tuple[Tensor, Tensor]:
        """A step of the head: logits after the last token, [1, V], and its own hidden states."""
        cache = self.cache
        cache.make_room(len(tokens))
        positions = range(cache.length, cache.length + len(tokens))
        logits, made = self.head.step(tokens, positions, hidden, self)
        cache.end_step(len(tokens))
        return logits, made


def _hidden_along(before: PathState | None, count: int) -> list[Tensor] | None:
    """The retrieval level's hidden states of the ``count`` tokens before the last one of a path that begins at the
    newest decided token; None where one is missing.
    """
    states: list[Tensor] = []
    while before is not None and before.hidden is not None:
        states.append(before.hidden)
        before = before.before
    return states[::-1] if before is None and len(states) == count else None
