"""Conversations by name: the messages in a file of their own, and the caches as sessions keep them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload_triforce.errors import InputError, TriForceError
from offload_triforce.generation.transcript import FILE, read_messages, write_messages
from offload_triforce.machine.folders import sessions_folder
from offload_triforce.runtime.session_folder import MANIFEST, session_path

if TYPE_CHECKING:
    from offload_triforce.engine import TriForce
    from offload_triforce.generation.dialogue import Dialogue
    from offload_triforce.runtime.conversation import Session


class Store:
    """The session of a conversation.

    A conversation with a name is kept: its messages after each answer, its caches when it is saved or left. Whatever
    befalls the caches, the messages can be read again.

    Attributes:
        session: that answers. name: of the conversation, or None.
    """

    def __init__(self, engine: TriForce, model: str) -> None:
        """``model``: what it was called, for people."""
        self._engine, self._model = engine, model
        self.name: str | None = None
        self.session: Session = engine.session()

    def open(self, name: str, dialogue: Dialogue, new: bool) -> str | None:
        """Let a conversation go on from the one of that name. ``new``: there need not be any.

        Returns:
            Why its caches cannot be used, if there are any and they cannot.

        Raises:
            InputError: there is none, or what is kept there cannot be read; the present conversation stays.
        """
        folder = session_path(name)
        messages = read_messages(folder)
        if not messages and not new:
            others = names()
            hint = f"there are {', '.join(others)}" if others else "none has been kept yet"
            raise InputError(f"there is no conversation {name}; {hint}")
        session, why_not = None, None
        if (folder / MANIFEST).exists():
            try:
                session = self._engine.load_session(folder)
            except TriForceError as error:
                why_not = str(error)
        self.session.close()
        self.session = dialogue.session = session or self._engine.session()
        self.name = name
        dialogue.begin(messages)
        return why_not

    def restart(self, dialogue: Dialogue) -> None:
        """Another conversation, without a name."""
        self.session.close()
        self.session, self.name = self._engine.session(), None
        dialogue.session = self.session
        dialogue.clear()

    def keep(self, messages: Sequence[dict[str, Any]]) -> None:
        """Keep the messages of a conversation that has a name.

        Raises:
            InputError: they cannot be written.
        """
        if self.name is not None:
            write_messages(session_path(self.name), messages, self._model)

    def save(self, name: str | None, messages: Sequence[dict[str, Any]]) -> Path:
        """Keep messages and caches. ``name``: a new one, or None for what it is called. Returns the folder.

        Raises:
            InputError: there is no name, or another conversation has it; or it cannot be written.
        """
        name = name or self.name
        if name is None:
            raise InputError("this conversation has no name yet; give it one: /save NAME")
        folder = session_path(name)
        if name != self.name and (folder / FILE).exists():
            raise InputError(
                f"there is a conversation {name} already; /load {name} goes on with it, or take another name"
            )
        write_messages(folder, messages, self._model)  # first: they are what cannot be had again
        self.name = name
        if len(self.session.tokens):
            self.session.save(folder)
        return folder

    def close(self) -> None:
        """Give the session's memory back."""
        self.session.close()


def names() -> list[str]:
    """Of the conversations that are kept."""
    with contextlib.suppress(OSError):
        return sorted(folder.parent.name for folder in sessions_folder().glob(f"*/{FILE}"))
    return []
