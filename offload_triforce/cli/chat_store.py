"""Conversations by name: the messages in a file of their own, and the caches as sessions keep them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload_triforce.cli.loading import Loading
from offload_triforce.errors import BusyError, InputError, TriForceError
from offload_triforce.generation.transcript import FILE, read_messages, write_messages
from offload_triforce.machine.folders import sessions_folder
from offload_triforce.runtime.session_folder import MANIFEST, session_path

if TYPE_CHECKING:
    from offload_triforce.engine import TriForce
    from offload_triforce.generation.dialogue import Dialogue
    from offload_triforce.runtime.conversation import Session

Stamp = tuple[int, int, int]


class Store:
    """The session of a conversation.

    A conversation with a name is kept: its messages after each answer, its caches when it is saved or left. Whatever
    befalls the caches, the messages can be read again.

    Attributes:
        session: that answers. name: of the conversation, or None. loading: told how far a saved session is read.
    """

    def __init__(self, engine: TriForce, model: str) -> None:
        """``model``: what it was called, for people."""
        self._engine, self._model = engine, model
        self.name: str | None = None
        self.loading = Loading()
        self._stamp: Stamp | None = None  # of the messages on disk, as they were last read or written here
        self.session: Session = engine.session()

    def open(self, name: str, dialogue: Dialogue, new: bool) -> str | None:
        """Let a conversation go on from the one of that name. ``new``: there need not be any.

        Returns:
            Why its caches cannot be used, if there are any and they cannot.

        Raises:
            InputError: there is none, or what is kept there cannot be read; the present conversation stays.
        """
        folder = session_path(name)
        stamp, messages = stamp_of(folder), read_messages(folder)
        if not messages and not new:
            others = names()
            hint = f"there are {', '.join(others)}" if others else "none has been kept yet"
            raise InputError(f"there is no conversation {name}; {hint}")
        session, why_not = None, None
        if (folder / MANIFEST).exists():
            try:
                session = self._engine.load_session(folder, self.loading)
            except TriForceError as error:
                why_not = str(error)
        self.session.close()
        self.session = dialogue.session = session or self._engine.session()
        self.name, self._stamp = name, stamp
        dialogue.begin(messages)
        return why_not

    def restart(self, dialogue: Dialogue) -> None:
        """Another conversation, without a name."""
        self.session.close()
        self.session, self.name, self._stamp = self._engine.session(), None, None
        dialogue.session = self.session
        dialogue.clear()

    def keep(self, messages: Sequence[dict[str, Any]]) -> None:
        """Keep the messages of a conversation that has a name.

        Raises:
            StorageError: they cannot be written. BusyError: somebody else has gone on with it.
        """
        if self.name is not None:
            self._write(self.name, self._stamp, messages)

    def _write(self, name: str, known: Stamp | None, messages: Sequence[dict[str, Any]]) -> None:
        """``known``: of the messages that may be replaced."""
        folder = session_path(name)
        if stamp_of(folder) not in (known, None):
            raise BusyError(
                f"the conversation {name} has been gone on with somewhere else, and is not replaced; /save NAME "
                "keeps this one under another name"
            )
        write_messages(folder, messages, self._model)
        self._stamp = stamp_of(folder)

    def save(self, name: str | None, messages: Sequence[dict[str, Any]]) -> Path:
        """Keep messages and caches. ``name``: a new one, or None for what it is called. Returns the folder.

        Raises:
            InputError: there is no name, or another conversation has it. StorageError: it cannot be written.
            BusyError: somebody else has gone on with it.
        """
        name = name or self.name
        if name is None:
            raise InputError("this conversation has no name yet; give it one: /save NAME")
        folder = session_path(name)
        if name != self.name and (folder / FILE).exists():
            raise InputError(
                f"there is a conversation {name} already; /load {name} goes on with it, or take another name"
            )
        # First: they are what cannot be had again.
        self._write(name, self._stamp if name == self.name else None, messages)
        self.name = name
        if len(self.session.tokens) or self.session.part_tokens:
            self.session.save(folder)
        return folder

    def close(self) -> None:
        """Give the session's memory back."""
        self.session.close()


def stamp_of(folder: Path) -> Stamp | None:
    """What tells one file of messages from the next, which is always a new one; None where there is none."""
    try:
        found = os.stat(folder / FILE)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def names() -> list[str]:
    """Of the conversations that are kept."""
    with contextlib.suppress(OSError):
        return sorted(folder.parent.name for folder in sessions_folder().glob(f"*/{FILE}"))
    return []
