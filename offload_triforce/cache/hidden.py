"""The target's hidden states of the newest tokens of a text: what a multi-token-prediction head reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from offload_triforce.cache.buffer import check_kept
from offload_triforce.cache.layer import Snapshot
from offload_triforce.scheduler.device import to_device


class HiddenWindow:
    """Hidden states, after the decoder's last norm, of a text's first ``sink`` tokens and of its newest ones.

    It keeps the protocol of the caches, so that what it holds always belongs to the text that they hold. Unlike theirs,
    its rows may be missing: what was never computed here (a text that is begun with keys and values which were read
    elsewhere) leaves a gap, and ``has`` says so.

    Attributes:
        length: committed tokens of the text. start: the first token from which on all were seen.
        opening: how many of the first ``sink`` tokens are there.
    """

    def __init__(self, capacity: int, sink: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        """``capacity``: newest tokens held, those of the opening apart. ``width``: of a hidden state."""
        self.capacity, self.sink = capacity, sink
        # Token n lies in row sink + n % capacity; the opening in the first rows as well.
        self._rows = torch.zeros(sink + capacity, width, dtype=dtype, device=device)
        self._seen: Tensor | None = None  # of the pending tokens, [T, width]
        self.reset()

    @property
    def shape(self) -> torch.Size:
        """Of what ``snapshot`` calls rows."""
        return self._rows.shape

    def reset(self) -> None:
        """Forget everything."""
        self.length = self.start = self.opening = self.pending = 0
        self._seen = None

    @property
    def oldest(self) -> int:
        """The first token from which on all hidden states are there."""
        return max(self.start, self.length - self.capacity)

    def has(self, part: range) -> bool:
        """Whether the hidden states of these tokens are there."""
        return part.stop <= self.opening or (self.oldest <= part.start and part.stop <= self.length)

    def rows(self, part: range) -> Tensor:
        """Their hidden states, [n, width].

        Raises:
            IndexError: they are not there.
        """
        if not self.has(part):
            raise IndexError(f"the hidden states of tokens {part.start} to {part.stop} are not there")
        if part.stop <= self.opening:
            return self._rows[part.start : part.stop]
        return self._rows.index_select(0, self._places(part))

    def wanted(self, part: range, total: int) -> list[range]:
        """Of some tokens of a text of ``total`` tokens, those whose hidden states will be held."""
        first = range(part.start, min(part.stop, self.sink))
        last = range(max(part.start, first.stop, total - self.capacity), part.stop)
        return [piece for piece in (first, last) if len(piece)]

    def fill(self, start: int, rows: Tensor) -> None:
        """Hidden states [n, width] of an empty text's tokens from ``start`` on, in order. ``end_fill`` follows."""
        part = range(start, start + len(rows))
        if start != self.length:
            self.start = start
        if start == 0:
            self.opening = min(self.sink, len(rows))
        elif start == self.opening:
            self.opening = min(self.sink, part.stop)
        self._put(part, rows)
        self.length = part.stop

    def end_fill(self, tokens: int) -> None:
        """The text has that many tokens. What was not filled is missing."""
        if self.length != tokens:
            self.start = self.length = tokens

    def cut(self, tokens: int) -> None:
        """Only the first ``tokens`` tokens stay; of those before what was held, nothing is known any more."""
        self.start, self.length = min(self.oldest, tokens), tokens
        self.opening, self.pending, self._seen = min(self.opening, tokens), 0, None

    def see(self, rows: Tensor) -> None:
        """The hidden states [T, width] of the tokens of the step that is under way."""
        self._seen = rows

    def end_step(self, tokens: int) -> None:
        """A step is through: its tokens are pending. Hidden states that nobody has shown will be missing."""
        self.pending = tokens
        if self._seen is not None and len(self._seen) != tokens:
            self._seen = None

    def select(self, kept: Sequence[int]) -> None:
        """See ``CacheLayers``."""
        check_kept(kept, self.pending)
        if self._seen is not None and list(kept) != list(range(self.pending)):
            kept_there = to_device(torch.tensor(list(kept), dtype=torch.long), self._rows.device)
            self._seen = self._seen.index_select(0, kept_there)
        self.pending = len(kept)

    def commit(self, tokens: int) -> None:
        """See ``CacheLayers``."""
        if not 0 <= tokens <= self.pending:
            raise IndexError(f"cannot accept {tokens} of {self.pending} pending tokens")
        part = range(self.length, self.length + tokens)
        if self._seen is None:
            self.start = part.stop if tokens else self.start
        else:
            self._put(part, self._seen[:tokens])
            if self.opening == part.start:
                self.opening = min(self.sink, part.stop)
        self.length, self.pending, self._seen = part.stop, 0, None

    def snapshot(self) -> dict[str, Tensor]:
        """See ``CacheLayers``."""
        numbers = torch.tensor([self.length, self.start, self.opening])
        return {"rows": self._rows.to("cpu", copy=True), "numbers": numbers}

    def restore(self, snapshot: Snapshot) -> None:
        """See ``CacheLayers``."""
        self.reset()
        self._rows.copy_(snapshot["rows"])
        self.length, self.start, self.opening = snapshot["numbers"].tolist()

    def _put(self, part: range, rows: Tensor) -> None:
        if part.start < self.sink:
            count = min(part.stop, self.sink) - part.start
            self._rows[part.start : part.start + count] = rows[:count]
        newest = max(0, len(part) - self.capacity)  # no row twice
        self._rows.index_copy_(0, self._places(part[newest:]), rows[newest:].to(self._rows.dtype))

    def _places(self, part: range) -> Tensor:
        return torch.arange(part.start, part.stop, device=self._rows.device) % self.capacity + self.sink
