"""A session as its user has it: one text that an engine goes on with, from question to question."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from offload_triforce.generation.answer import Generation, TextStream
from offload_triforce.generation.async_stream import AsyncTextStream
from offload_triforce.generation.checks import Prompt


class SessionEngine(Protocol):
    """What a session asks of its engine."""

    def stream(self, prompt: Prompt, *args: Any, session: Any = None, **options: Any) -> TextStream: ...

    def astream(self, prompt: Prompt, *args: Any, session: Any = None, **options: Any) -> AsyncTextStream: ...

    def save_session(self, session: Session, path: str | Path) -> None: ...

    def close_session(self, session: Session) -> None: ...


class Session:
    """One text of an engine. What was read of it is not read again.

    >>> session = engine.session()
    >>> first = session.generate([{"role": "user", "content": document + question}])
    >>> session.save("report")

    Each prompt is the whole text, as without a session: of what is held, the longest common beginning is used again,
    and ``stats.reused_tokens`` says how much that was.
    """

    def __init__(self, engine: SessionEngine) -> None:
        """See ``TriForce.session``."""
        self._engine = engine

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
    def tokens(self) -> Sequence[int]:
        """Ids of the tokens that are held."""
        raise NotImplementedError

    def save(self, path: str | Path) -> None:
        """Write what is held to a folder; what is there already of the same text is not written again.

        Raises:
            InputError, StorageError: the folder is of something else, or full; an older session there stays whole.
        """
        self._engine.save_session(self, path)

    def close(self) -> None:
        """Forget the text, and give its memory back."""
        self._engine.close_session(self)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
