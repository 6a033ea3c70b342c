"""The token sequence that all levels share: decided tokens, and guesses at its end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class TokenText:
    """Token ids on the CPU, in one buffer: growing and taking back move no memory."""

    def __init__(self, prompt: Tensor, capacity: int) -> None:
        """``prompt``: (n,) token ids. ``capacity``: most tokens there will ever be.

        ``decided`` counts the tokens that are final; all behind them are guesses.
        """
        self._ids = torch.empty(capacity, dtype=torch.long, device="cpu")
        self._ids[: len(prompt)] = prompt
        self._length = self.decided = len(prompt)

    def decide(self) -> None:
        """What there is now is final."""
        self.decided = self._length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> list[int]:
        return self.ids[part].tolist()

    @property
    def ids(self) -> Tensor:
        """All ids so far, (n,): a view."""
        return self._ids[: self._length]

    def append(self, tokens: Sequence[int]) -> None:
        """Put tokens at the end."""
        end = self._length + len(tokens)
        self._ids[self._length : end] = torch.as_tensor(tokens, dtype=torch.long, device="cpu")
        self._length = end

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        self._length = length
