"""Answers for programs with an event loop: decoded on a thread of their own, read with ``async for``."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from offload_triforce.errors import InputError
from offload_triforce.generation.answer import Generation, TextStream
from offload_triforce.generation.turn import Answer


@dataclass(frozen=True)
class _End:
    """The last thing that a worker says: why it ended, if not because the answer is complete."""

    error: BaseException | None = None


class AsyncTextStream:
    """An answer while it comes: ``async for piece in engine.astream(...)``.

    It begins with the first piece that is asked for, or waits for its turn on the engine then, while the event loop
    goes on. Where the task that reads it is cancelled, or the stream is closed or dropped, the decoding stops at its
    next pass or chunk of the prompt, and the engine is free for others. ``async with`` closes it in any case. What the
    reader has not taken yet is kept: a slow reader does not hold the engine.
    """

    def __init__(self, start: Callable[[Answer], TextStream]) -> None:
        """``start``: begins the answer, on the worker's thread; it may wait."""
        self._start, self._answer = start, Answer()
        self._said: asyncio.Queue[str | _End] = asyncio.Queue()
        self._ended: asyncio.Future[TextStream | None] | None = None  # None: not begun
        self._over = False

    def __aiter__(self) -> AsyncTextStream:
        return self

    async def __anext__(self) -> str:
        if self._over:
            raise StopAsyncIteration
        if self._ended is None:
            self._ended = _begin(self._start, self._answer, self._said)
        try:
            said = await self._said.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if not isinstance(said, _End):
            return said
        await self.aclose()
        if said.error is not None:
            raise said.error
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """End it, and return when the engine is free for others."""
        self._over = True
        self._answer.cancel()
        if self._ended is not None:
            await asyncio.shield(self._ended)

    async def __aenter__(self) -> AsyncTextStream:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self._answer.cancel()

    @property
    def result(self) -> Generation:
        """What has been generated, once it has ended.

        Raises:
            InputError: it has not, or was cancelled before it began.
        """
        stream = self._ended.result() if self._ended is not None and self._ended.done() else None
        if stream is None:
            raise InputError("there is no result before the answer has begun and ended; read or close the stream first")
        return stream.result


def _begin(
    start: Callable[[Answer], TextStream], answer: Answer, said: asyncio.Queue[str | _End]
) -> asyncio.Future[TextStream | None]:
    """Decode on a thread; ``said`` gets the pieces. The future is done when the thread has let the engine go."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[TextStream | None] = loop.create_future()

    def tell(what: Callable[..., object], *values: Any) -> None:
        try:
            loop.call_soon_threadsafe(what, *values)
        except RuntimeError:  # the loop has been closed: nobody listens any more
            answer.cancel()

    def work() -> None:
        stream, end = None, _End()
        try:
            with start(answer) as stream:
                for piece in stream:
                    tell(said.put_nowait, piece)
        except BaseException as error:
            end = _End(error)
        tell(said.put_nowait, end)
        tell(_set, ended, stream)

    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(work,), name="offload-triforce answer", daemon=True).start()
    return ended


def _set(future: asyncio.Future[TextStream | None], stream: TextStream | None) -> None:
    if not future.done():  # cancelled with its loop
        future.set_result(stream)
