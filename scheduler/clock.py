"""How long work takes, told by whoever does it: a device that is given work ahead of time, or the host itself."""

from __future__ import annotations

import time
from typing import Protocol


class Mark(Protocol):
    """A point in the work of a device, whose time is known once the device has got there."""

    def since(self, earlier: Mark) -> float:
        """Seconds from an earlier mark of the same clock to this one. Waits until it is reached."""


class Clock(Protocol):
    """Tells the time by the work that is done, not by when it was asked for."""

    def mark(self) -> Mark:
        """The end of the work issued so far."""


class HostMark:
    """A point in the host's own work."""

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def since(self, earlier: HostMark) -> float:
        """Seconds in between."""
        return self._at - earlier._at


class HostClock:
    """Of a host that does the work itself, or waits for it."""

    def mark(self) -> HostMark:
        """Now."""
        return HostMark()
