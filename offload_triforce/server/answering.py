"""One answer of the engine for one client: it waits in the line, is decoded on a thread, and ends with its client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from offload_triforce.errors import BusyError
from offload_triforce.generation.answer import TextStream
from offload_triforce.generation.async_stream import AsyncTextStream
from offload_triforce.generation.request import Request
from offload_triforce.generation.turn import Answer
from offload_triforce.server.line import Place
from offload_triforce.server.reporter import Ended, Event, Reporter, to_loop
from offload_triforce.server.service import Service
from offload_triforce.server.spelling import Speller
from offload_triforce.speculation.stats import INTERRUPTED


@dataclass(frozen=True)
class Question:
    """What the engine is to be asked.

    Attributes:
        request: interpreted. seed: of the draws. speller: of the answer.
        top_logprobs: the likeliest tokens to be told for each place; None where no logprobs are asked for.
    """

    request: Request
    seed: int
    speller: Speller
    top_logprobs: int | None = None


class Answering:
    """An answer while it comes: iterate over its events. Leaving the iteration gives the answer up.

    A task of its own holds the place in the line until the engine is free for the next, whatever becomes of the client:
    a slow one keeps nobody waiting, and one that is gone frees its place when the present pass is over.
    """

    def __init__(self, service: Service, question: Question, place: Place) -> None:
        self._service, self._question, self._place = service, question, place
        self._events: asyncio.Queue[Event | BaseException] = asyncio.Queue()
        self._driver = service.start(self._drive())
        self._driver.add_done_callback(lambda _: place.leave())  # also where it never came to its first line

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self._question.request.prompt)

    def cancel(self) -> None:
        """Give it up. Nothing happens if it is over."""
        self._driver.cancel()

    async def events(self) -> AsyncIterator[Event]:
        """What happens, up to ``Ended``.

        Raises:
            TriForceError: of the engine.
        """
        try:
            while True:
                event = await self._events.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if isinstance(event, Ended):
                    return
        finally:
            self.cancel()

    async def _drive(self) -> None:
        """Wait, decode, let the next one come."""
        service, question, place = self._service, self._question, self._place
        tell = to_loop(self._events)
        try:
            await place.turn()
            reporter = Reporter(question.speller, len(question.request.prompt), service.held, tell)
            request = _with(question, reporter)

            def start(answer: Answer) -> TextStream:
                reporter.begin()
                stream = service.engine.run(request, question.seed, reporter, reporter.progress, answer=answer)
                service.begun(stream.stats)
                return stream

            async with AsyncTextStream(start) as stream:
                async for _ in stream:
                    pass
            stats = stream.result.stats
            if stats.finish_reason == INTERRUPTED:
                raise BusyError("the answer was interrupted: the server is being stopped; ask again later")
            found = question.speller.watch.found
            reason = "length" if stats.finish_reason == "length" and found is None else "stop"
            tell(Ended(reason, found, stats))
            service.done(stats)
        except asyncio.CancelledError:
            service.cancelled()
            raise
        except Exception as error:
            service.failed(error)
            tell(error)


def _with(question: Question, reporter: Reporter) -> Request:
    request = question.request
    watch = None if question.top_logprobs is None else reporter.watch_logprobs(question.top_logprobs)
    return replace(request, criteria=type(request.criteria)([*request.criteria, reporter]), watch=watch)
