"""Answers on their way out: as server-sent events, or whole; and given up where the client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from offload_triforce.server.errors import ApiError, as_api_error

Value = TypeVar("Value")
ALIVE = b": still here\n\n"  # a comment: proxies see traffic, clients see nothing
PING = b'event: ping\ndata: {"type":"ping"}\n\n'  # Anthropic's word for it
DONE = b"data: [DONE]\n\n"
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def event(data: Any, name: str | None = None) -> bytes:
    """A server-sent event."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return (f"event: {name}\n" if name else "").encode() + b"data: " + text.encode("utf-8", "replace") + b"\n\n"


class EventStream(StreamingResponse):
    """A stream of events. What goes wrong in its middle becomes its last event; it is never silent for long."""

    def __init__(
        self, parts: AsyncIterator[bytes], close: Callable[[], None], ping_seconds: float, anthropic: bool = False
    ) -> None:
        """``close``: called at the end, also where the client had gone before there was a beginning."""
        alive = kept_alive(parts, ping_seconds, PING if anthropic else ALIVE)
        super().__init__(_with_errors(alive, anthropic), media_type="text/event-stream", headers=_HEADERS)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As an ASGI application."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def kept_alive(parts: AsyncIterator[bytes], seconds: float, sign: bytes) -> AsyncIterator[bytes]:
    """Parts of a stream, and ``sign`` wherever there is nothing else for ``seconds``.

    It goes by what is sent, not by what happens: a long prompt that is read chunk by chunk, and a call of a tool that
    is told when it is complete, say nothing to the client for minutes.
    """
    async with contextlib.aclosing(parts):
        coming = asyncio.ensure_future(_next(parts))
        try:
            while True:
                await asyncio.wait({coming}, timeout=seconds)
                if not coming.done():
                    yield sign
                    continue
                if (part := coming.result()) is None:
                    return
                yield part
                coming = asyncio.ensure_future(_next(parts))
        finally:
            coming.cancel()  # before the generator that it runs is closed
            await asyncio.gather(coming, return_exceptions=True)


async def _next(parts: AsyncIterator[bytes]) -> bytes | None:
    return await anext(parts, None)


async def _with_errors(parts: AsyncIterator[bytes], anthropic: bool) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(parts):
        try:
            async for part in parts:
                yield part
        except Exception as error:
            told = as_api_error(error)
            yield event(told.anthropic(), "error") if anthropic else event(told.openai())


async def unless_gone(request: Request, work: Awaitable[Value]) -> Value:
    """The result of some work, which is given up if the client goes away meanwhile. The body has been read.

    Raises:
        ApiError: it has; nobody will see this.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client went away")
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
