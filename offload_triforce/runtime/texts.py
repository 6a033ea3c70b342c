"""The caches of one engine, made when they are first needed, and the texts that have been in them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from offload_triforce.config import Settings
from offload_triforce.errors import MemoryLimitError
from offload_triforce.generation.turn import Answer, Turns
from offload_triforce.machine.teams import release_team
from offload_triforce.machine.units import MOST_TOKENS
from offload_triforce.model.layout import ModelLayout
from offload_triforce.model.prefill import Progress
from offload_triforce.planner.choose import choose_for_loaded
from offload_triforce.runtime.drafters import Drafters
from offload_triforce.runtime.held import TextSource
from offload_triforce.runtime.pool import SessionPool, Text
from offload_triforce.runtime.runtime import Runtime
from offload_triforce.runtime.session import Session
from offload_triforce.scheduler.device import on


class Texts:
    """Of one engine; used by whoever has its turn.

    Attributes:
        session: the text in the caches; None while there are no caches.
    """

    def __init__(
        self, model: PreTrainedModel, layout: ModelLayout, settings: Settings, drafters: Drafters, turns: Turns
    ) -> None:
        """``drafters``: their caches come and go with the target's. ``turns``: of whoever uses them."""
        self._turns = turns
        self._model, self._layout, self._settings, self._drafters = model, layout, settings, drafters
        self.session: Session | None = None
        self.pool = SessionPool(settings.session_memory)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """The caches, for something else than an answer. It waits for its turn, as an answer does."""
        answer = Answer()
        try:
            self._turns.take(answer, wait=True)
            with on(self._layout.device), torch.inference_mode(False), torch.no_grad():
                yield
        finally:
            self._turns.release(answer)
            release_team()

    @property
    def runtime(self) -> Runtime | None:
        """The caches; None where there are none."""
        session = self.session  # looked at once: others may ask while it changes
        return None if session is None else session.runtime

    @property
    def parked_bytes(self) -> int:
        """Bytes of host memory that texts take which are not in the caches, and what was read in part of that there."""
        session = self.session
        part = None if session is None else session.part
        return self.pool.parked_bytes + (0 if part is None else part.size)

    def ensure(self, needed: int, pinning: Progress | None = None) -> Session:
        """Caches for so many tokens. Where those that there are do not suffice, their text is parked meanwhile.

        Raises:
            MemoryLimitError, InputError: they do not fit.
        """
        runtime = self.runtime
        grown = runtime is not None and runtime.context < needed
        if grown:
            self.pool.unseat(self.session)
            self.give_back()
        if self.session is None:
            self.session = Session(self._make_runtime(needed, grown, pinning), True, self.pool.has_room)
        return self.session

    def seat(self, prompt: Tensor, text: Text | None) -> None:
        """Bring into the caches what is held of ``prompt`` (n,), for ``text``, or for whichever it goes on with."""
        if self._settings.reuse or text is not None:
            self.pool.seat(self.session, prompt, text)
        else:
            self.pool.unseat(self.session)
            self.session.forget()

    def source(self, text: Text) -> TextSource | None:
        """Where a text can be read from, until something else is asked of the engine; None where nothing is held."""
        return self.pool.source(text, self.session)

    def tokens(self, text: Text) -> Tensor:
        """Ids of what is held of a text, int64 (n,)."""
        session, parked = self.session, text.parked
        if text is self.pool.seated and session is not None:
            return session.ids.clone()
        return torch.empty(0, dtype=torch.long) if parked is None else parked.tokens

    def part_tokens(self, text: Text) -> int:
        """How many tokens behind those are read in part."""
        session, parked = self.session, text.parked
        held = session if text is self.pool.seated and session is not None else parked
        part = None if held is None else held.part
        return 0 if part is None else len(part.tokens)

    def give_back(self) -> None:
        """Free the caches. The text in them is lost; those that are parked stay."""
        self._drafters.close()
        self.pool.lose()
        runtime, self.session = self.runtime, None
        if runtime is not None:
            runtime.close()
            del runtime
            if self._layout.device.type == "cuda":
                torch.cuda.empty_cache()  # so that what was freed counts as free

    def close(self) -> None:
        """Free everything. Texts that nobody owns are kept on disk, where the settings name a folder for that."""
        self.pool.keep_all(self.session)
        self.give_back()
        self.pool.clear()

    def _make_runtime(self, needed: int, grown: bool, pinning: Progress | None) -> Runtime:
        """Caches for that many tokens; for half as many again, where a text has outgrown others before.

        Where they do not fit, parked texts make way.
        """
        make = partial(self._runtime_of, pinning=pinning)
        if grown and self._settings.context is None:
            with contextlib.suppress(MemoryLimitError):
                return make(min(needed + needed // 2, self._layout.max_positions or MOST_TOKENS))
        try:
            return make(self._settings.context or needed)
        except MemoryLimitError:
            if not self.pool.make_way():
                raise
        return make(self._settings.context or needed)

    def _runtime_of(self, context: int, pinning: Progress | None) -> Runtime:
        self._drafters.settle(context)
        coming = self._drafters.bytes_to_come
        settings = choose_for_loaded(self._model, self._layout, self._settings, context, coming)
        with on(self._layout.device), torch.inference_mode(False):  # else the lanes' threads could not write there
            keeps = self._drafters.head is not None
            return Runtime(self._model, self._layout, settings, context, pinning, keep_hidden=keeps)
