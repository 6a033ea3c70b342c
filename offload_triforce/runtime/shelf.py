"""A folder for texts that memory has no room for: they leave for it one by one, and all when an engine closes."""

from __future__ import annotations

import re
import secrets
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path

from offload_triforce.errors import InputError, TriForceError
from offload_triforce.model.identity import ModelIdentity
from offload_triforce.runtime.held import KVShape, TextSource
from offload_triforce.runtime.session_files import TextOnDisk, open_text, remove_text, save_text
from offload_triforce.runtime.session_folder import load_manifest

_NAME = re.compile(r"text-[0-9a-f]{12}")


class Shelf:
    """Texts of one model in one folder. What went wrong there is a warning: it costs a reading, and no answer."""

    def __init__(self, folder: Path, identity: ModelIdentity, shape: KVShape) -> None:
        """``identity``: of the model. ``shape``: of its keys and values."""
        self._folder, self._identity, self._shape = folder.expanduser(), identity, shape
        self._own: weakref.WeakSet[TextOnDisk] = weakref.WeakSet()  # a user's session may lie in the same folder

    def holds(self, source: TextSource | None) -> bool:
        """Whether it lies here."""
        return isinstance(source, TextOnDisk) and source in self._own

    def put(self, source: TextSource, home: TextSource | None = None) -> TextSource | None:
        """Save a text; returns where it lies from now on, or None if it could not be saved.

        ``home``: where an older state of it lies here, if one does: only what is new is written. Unless another process
        has gone on with it meanwhile: then either's is kept.
        """
        folder = home.folder if self._is_as_it_was(home) else self._folder / f"text-{secrets.token_hex(6)}"
        try:
            save_text(folder, source, self._identity)
            return self._open(folder)
        except TriForceError as error:
            _warn(f"a text was not kept: {error}")
            return None

    def _is_as_it_was(self, source: TextSource | None) -> bool:
        """Whether a text lies here, and nobody else has changed it since it was opened."""
        if not self.holds(source):
            return False
        try:
            return load_manifest(source.folder) == source.manifest
        except TriForceError:
            return False

    def drop(self, source: TextSource | None) -> None:
        """Remove a text of this shelf; others are left alone."""
        if self.holds(source):
            try:
                remove_text(source.folder)
            except TriForceError as error:
                _warn(str(error))

    def texts(self) -> Iterator[TextOnDisk]:
        """Those of this model that lie there, oldest first. Damaged ones are named in a warning."""
        folders = [path for path in self._folder.glob("text-*") if _NAME.fullmatch(path.name) and path.is_dir()]
        for folder in sorted(folders, key=lambda path: path.stat().st_mtime):
            try:
                yield self._open(folder)
            except InputError as error:
                if "is of" not in str(error):  # those of other models wait for theirs
                    _warn(str(error))
            except TriForceError as error:
                _warn(str(error))

    def _open(self, folder: Path) -> TextOnDisk:
        text = open_text(folder, self._identity, self._shape)
        self._own.add(text)
        return text


def _warn(what: str) -> None:
    warnings.warn(what, RuntimeWarning, stacklevel=3)
