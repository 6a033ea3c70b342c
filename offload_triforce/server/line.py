"""The line in front of the engine: one answer at a time, first come first served, and no longer than it may be."""

from __future__ import annotations

import asyncio
import math
import time

from offload_triforce.server.errors import ApiError

FIRST_ESTIMATE = 5.0  # seconds per answer, before there has been one
MEMORY = 0.7  # share of the old estimate in a new one
MOST_RETRY = 600  # seconds that a client is asked to stay away


class Line:
    """Who waits for the engine. For one event loop."""

    def __init__(self, limit: int) -> None:
        """``limit``: most that wait, beside the one whose turn it is."""
        self.limit = limit
        self._places: list[Place] = []  # the first one has the turn
        self._seconds = FIRST_ESTIMATE

    @property
    def waiting(self) -> int:
        """How many wait."""
        return max(0, len(self._places) - 1)

    @property
    def busy(self) -> bool:
        """Whether it is somebody's turn."""
        return bool(self._places)

    def check(self) -> None:
        """Refuse early what could not be waited for.

        Raises:
            ApiError: 429, with the time after which it may be worth while.
        """
        if len(self._places) <= self.limit:
            return
        wait = min(MOST_RETRY, max(1, math.ceil(self._seconds)))
        message = f"{self.waiting:,} requests wait already, and no more than {self.limit:,} may; try again in {wait} s"
        headers = {"Retry-After": str(wait)}
        raise ApiError(429, message, "rate_limit_error", code="queue_full", headers=headers)

    def join(self) -> Place:
        """A place at the end. It is to be left in any case.

        Raises:
            ApiError: as ``check``.
        """
        self.check()
        place = Place(self)
        self._places.append(place)
        self._call()
        return place

    def leave(self, place: Place) -> None:
        """Somebody is done, or waits no longer."""
        if place not in self._places:
            return
        if place.began is not None:
            self._seconds = MEMORY * self._seconds + (1 - MEMORY) * (time.monotonic() - place.began)
        self._places.remove(place)
        self._call()

    def _call(self) -> None:
        if self._places:
            self._places[0].call()


class Place:
    """A place in a line."""

    def __init__(self, line: Line) -> None:
        self.began: float | None = None  # when its turn came
        self._line, self._turn = line, asyncio.Event()

    async def turn(self) -> None:
        """Wait until it is this one's turn. It lasts until ``leave``."""
        await self._turn.wait()

    def call(self) -> None:
        """It is its turn."""
        if self.began is None:
            self.began = time.monotonic()
        self._turn.set()

    def leave(self) -> None:
        """Let the next one come. As often as one likes."""
        self._line.leave(self)
