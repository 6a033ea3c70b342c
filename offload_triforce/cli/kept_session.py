"""The session of ``generate --session NAME``: gone on with or begun, and saved whatever the answer ends with."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from offload_triforce.cli.ending import say
from offload_triforce.cli.loading import Loading
from offload_triforce.cli.sessions import bytes_bar
from offload_triforce.machine.units import gigabytes
from offload_triforce.runtime.session_folder import MANIFEST, check_free, check_writable, load_manifest, session_path

if TYPE_CHECKING:
    from offload_triforce.engine import TriForce


class KeptSession:
    """One session on disk. It is checked before the model is loaded, as far as that goes.

    Attributes:
        loading: told how far it is read.
    """

    def __init__(self, name: str) -> None:
        """``name``: or a path with a slash in it.

        Raises:
            InputError: no such name, or what is there is damaged. StorageError: nothing can be saved there.
        """
        self.loading = Loading()
        self.folder = session_path(name)
        self._old = os.path.lexists(self.folder / MANIFEST)
        if self._old:
            load_manifest(self.folder)
        else:
            check_free(self.folder)
        check_writable(self.folder)

    def open(self, engine: TriForce) -> None:
        """Go on with what is there, or begin anew.

        Raises:
            InputError: it is of another model, or damaged. StorageError: it cannot be read.
        """
        if self._old:
            self.session = engine.load_session(self.folder, self.loading)
            say(f"going on with {self.folder}: {len(self.session.tokens):,} tokens{self._in_part()}")
        else:
            self.session = engine.session()

    def save(self) -> None:
        """Save what has been read and written so far.

        Raises:
            InputError, BusyError, StorageError: what was saved before is there still.
        """
        if not len(self.session.tokens) and not self.session.part_tokens:
            return  # it was stopped before anything was read
        with bytes_bar(f"saving {self.folder.name}") as told:
            saved = self.session.save(self.folder, told)
        size = f"{gigabytes(saved.size)}, of these {gigabytes(saved.written)} anew"
        say(f"saved {saved.folder}: {saved.tokens:,} tokens{self._in_part()}, {size}")

    def _in_part(self) -> str:
        part = self.session.part_tokens
        return f", and {part:,} more in part" if part else ""
