"""The token sequence that all levels share: decided tokens, and draft tokens at its end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from offload_triforce.scheduler.device import to_device


class TokenText:
    """Token ids on the CPU, in one buffer: growing and taking back move no memory. A copy follows on a device."""

    def __init__(self, prompt: Tensor, capacity: int) -> None:
        """``prompt``: (n,) token ids. ``capacity``: most tokens there will ever be.

        ``decided`` counts the tokens that are final; all behind them are draft tokens.
        """
        self._ids = torch.empty(capacity, dtype=torch.long, device="cpu")
        self._ids[: len(prompt)] = prompt
        self._length = self.decided = len(prompt)
        # The first ``_arrived`` ids, on the device that was last asked for.
        self._device, self._there, self._arrived = self._ids.device, self._ids, 0

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

    @property
    def buffer(self) -> Tensor:
        """The memory that ids are in, (capacity,): what there will be is undefined, and drafts come and go."""
        return self._ids

    def ids_on(self, device: torch.device) -> Tensor:
        """All ids so far on a device, (n,). Each decided one is brought there once."""
        if device == self._ids.device:  # what is taken back must not change under the eyes of whoever keeps it
            return self.ids if self._length == self.decided else self.ids.clone()
        if self._device != device:
            self._device, self._there, self._arrived = device, torch.empty_like(self._ids, device=device), 0
        if self._arrived < self.decided:
            news = slice(self._arrived, self.decided)
            self._there[news] = to_device(self._ids[news], device)
            self._arrived = self.decided
        decided, drafted = self._there[: self.decided], self.ids[self.decided :]
        return torch.cat([decided, to_device(drafted, device)]) if len(drafted) else decided

    def append(self, tokens: Sequence[int]) -> None:
        """Put tokens at the end."""
        end = self._length + len(tokens)
        self._ids[self._length : end] = torch.as_tensor(tokens, dtype=torch.long, device="cpu")
        self._length = end

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        self._length = length
        self.decided, self._arrived = min(self.decided, length), min(self._arrived, length)
