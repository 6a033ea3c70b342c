"""What all paths of the server share: the engine, the line in front of it, and what is counted."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import Any

from transformers import PreTrainedTokenizerBase

from offload_triforce.engine import TriForce
from offload_triforce.errors import InputError, TriForceError
from offload_triforce.generation.options import token_ids
from offload_triforce.server.errors import ApiError, quote
from offload_triforce.server.line import Line
from offload_triforce.server.metrics import Metrics
from offload_triforce.server.options import ServerOptions
from offload_triforce.server.structured import Grammars
from offload_triforce.speculation.stats import DecodeStats

log = logging.getLogger("offload_triforce.server")


class Service:
    """One engine for many clients. For one event loop.

    Attributes:
        engine, options: as given. line: who waits. metrics: what is counted. started: when, in seconds of the epoch.
        ends: tokens that end a text. grammars: over the model's tokens.
        stats: of the answer that is under way, or of the last one; None before the first.
    """

    def __init__(self, engine: TriForce, options: ServerOptions) -> None:
        """``engine``: with a tokenizer; it is closed by whoever made it.

        Raises:
            InputError: it has no tokenizer.
        """
        if engine.tokenizer is None:
            raise InputError("a server needs a model with its tokenizer; load one with the model")
        self.engine, self.options = engine, options
        self.tokenizer: PreTrainedTokenizerBase = engine.tokenizer
        self.line, self.metrics = Line(options.queue), Metrics()
        self.metrics.watch(self.line, engine)
        self.started = int(time.time())
        ends = engine.model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        self.ends = [] if ends is None else token_ids("eos_token_id", ends)
        self.grammars = Grammars(self.tokenizer, engine.layout.vocabulary, self.ends)
        self.stats: DecodeStats | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def busy(self) -> bool:
        """Whether an answer is under way."""
        return self.line.busy

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return self.line.waiting

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that goes on whatever becomes of the client."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """End what is still under way; returns when the engine is free."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def check_model(self, name: str | None) -> str:
        """The name that a client is answered with.

        Raises:
            ApiError: 404 for a model that is not served here.
        """
        names = self.options.names
        if name is None or name in names:
            return name or names[0]
        message = f"the model {quote(name)} is not served here; there is {', '.join(map(repr, names))}"
        raise ApiError(404, message, param="model", code="model_not_found")

    def held(self) -> int:
        """Tokens in the engine's caches. To be asked by the thread that decodes."""
        runtime = self.engine.runtime
        return 0 if runtime is None else runtime.caches.length

    def begun(self, stats: DecodeStats) -> None:
        """An answer is under way."""
        self.stats = stats

    def done(self, stats: DecodeStats) -> None:
        """An answer is complete."""
        self.metrics.answered(stats)

    def cancelled(self) -> None:
        """A client has gone before its answer was complete."""
        self.metrics.ended("cancelled")

    def failed(self, error: Exception) -> None:
        """The engine gave no answer."""
        self.metrics.ended("failed")
        if not isinstance(error, TriForceError):
            log.error("an answer failed", exc_info=error)
