"""What coupled acceptance draws with: the same noise for every level, whoever asks for it, and when."""

from __future__ import annotations

import random
from collections import deque

import torch
from torch import Tensor


class Noise:
    """Independent standard Gumbel noise (V,) for each position of a text, from a seed."""

    def __init__(self, seed: int, first: int, vocabulary: int, device: torch.device) -> None:
        """``first``: the position that decoding begins at."""
        # torch's CPU generator takes 32 bits of a seed; let all bits of ours count.
        self._generator = torch.Generator(device).manual_seed(random.Random(seed).getrandbits(32))
        self._first, self._vocabulary, self._device = first, vocabulary, device
        self._rows: deque[Tensor] = deque()

    def at(self, position: int) -> Tensor:
        """The noise of a position, which must not have been forgotten."""
        if position < self._first:
            raise IndexError(f"the noise of position {position} has been forgotten")
        while len(self._rows) <= position - self._first:  # in order, so that it does not matter who asks when
            row = torch.empty(self._vocabulary, device=self._device)
            self._rows.append(row.exponential_(generator=self._generator).log_().neg_())
        return self._rows[position - self._first]

    def forget(self, position: int) -> None:
        """What comes before ``position`` will not be asked for again."""
        while self._first < position:
            self.at(self._first)  # what was never asked for is drawn all the same
            self._rows.popleft()
            self._first += 1
