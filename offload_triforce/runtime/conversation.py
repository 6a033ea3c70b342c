"""A session as its user has it: one text that an engine goes on with, from question to question."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from offload_triforce.generation.answer import Generation, TextStream
from offload_triforce.generation.async_stream import AsyncTextStream
from offload_triforce.generation.checks import Prompt
from offload_triforce.model.prefill import Progress
from offload_triforce.runtime.pool import Text
from offload_triforce.runtime.saving import Saver
from offload_triforce.runtime.session_files import SavedText
from offload_triforce.runtime.texts import Texts


class Engine(Protocol):
    """What a session asks of its engine."""

    def stream(self, prompt: Prompt, *args: Any, **options: Any) -> TextStream:
        """See ``TriForce.stream``."""

    def astream(self, prompt: Prompt, *args: Any, **options: Any) -> AsyncTextStream:
        """See ``TriForce.astream``."""


class Session:
    """One text of an engine. What was read of it is not read again.

    >>> session = engine.session()
    >>> first = session.generate(document + question)
    >>> second = session.generate(document + question + first.text + another)

    Each prompt is the whole text, as without a session: of what is held, the longest common beginning is used again,
    and ``stats.reused_tokens`` says how much that was.
    """

    def __init__(self, engine: Engine, texts: Texts, saver: Saver, text: Text) -> None:
        """See ``TriForce.session``."""
        self._engine, self._texts, self._saver, self.text = engine, texts, saver, text

    def generate(self, prompt: Prompt, *args: Any, **options: Any) -> Generation:
        """See ``TriForce.generate``."""
        with self.stream(prompt, *args, **options) as stream:
            for _ in stream:
                pass
            return stream.result

    def stream(self, prompt: Prompt, *args: Any, **options: Any) -> TextStream:
        """See ``TriForce.stream``."""
        return self._engine.stream(prompt, *args, session=self, **options)

    def astream(self, prompt: Prompt, *args: Any, **options: Any) -> AsyncTextStream:
        """See ``TriForce.astream``."""
        return self._engine.astream(prompt, *args, session=self, **options)

    @property
    def tokens(self) -> Tensor:
        """Ids of the tokens that are held, int64 (n,)."""
        return self._texts.tokens(self.text)

    @property
    def part_tokens(self) -> int:
        """Tokens behind those that a stopped prefill has read in part: a prompt that has them too goes on there."""
        return self._texts.part_tokens(self.text)

    def save(self, path: str | Path, progress: Progress | None = None) -> SavedText:
        """Write what is held to a folder; what lies there already of the same text is not written again.

        ``progress``: told (bytes written, bytes to write). ``TriForce.load_session`` goes on with it.

        Raises:
            InputError: there is nothing to save, or the folder is of something else. BusyError: somebody saves there.
            StorageError: the disk is full or refuses. An older session there stays whole in any case.
        """
        return self._saver.save(self.text, Path(path), progress)

    def make_room(self, tokens: int) -> None:
        """Make the engine's caches for so many tokens now, and not with the first request.

        Raises:
            MemoryLimitError, InputError: they do not fit.
        """
        with self._texts.turn():
            self._texts.ensure(tokens)

    def close(self) -> None:
        """Forget the text, and give its memory back."""
        with self._texts.turn():
            self._texts.pool.remove(self.text)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
