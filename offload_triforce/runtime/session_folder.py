"""The folder of a saved session: its name, its lock, its manifest, and what can be done with it without a model.

Nothing here needs torch: listing, showing, verifying and removing sessions are quick.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from offload_triforce.errors import BusyError, InputError, StorageError
from offload_triforce.generation.transcript import FILE as TRANSCRIPT
from offload_triforce.machine.folders import sessions_folder
from offload_triforce.runtime.session_manifest import (
    MOST_BYTES,
    OWN_FILE,
    FileEntry,
    Manifest,
    ManifestError,
    VersionError,
    read_manifest,
)

MANIFEST, NEW_MANIFEST, LOCK = "session.json", "session.json.new", ".lock"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# Links are not followed, so that no manifest reaches out of its folder; a pipe must not block.
_READING = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


def session_path(name: str) -> Path:
    """The folder of a session: of a name, below ``sessions_folder``; what has a slash in it is a path already.

    Raises:
        InputError: neither.
    """
    if "/" in name:
        if "\0" in name:
            raise InputError(f"{name!r} is no path: there is a zero byte in it")
        return Path(os.path.expanduser(name))
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name!r} cannot be the name of a session; take up to 64 letters, digits, dots, dashes and underscores, "
            "beginning with a letter or digit, or a path with a slash in it"
        )
    return sessions_folder() / name


class NoSession(InputError):
    """There is nothing there."""


class OtherVersion(InputError):
    """What is there can be read by another version of the program."""


@dataclass(frozen=True)
class SessionSummary:
    """A saved session for people. ``manifest``: None of a damaged one, of which ``problem`` says what is wrong."""

    name: str
    path: Path
    manifest: Manifest | None
    problem: str | None = None


def list_texts(root: Path) -> list[SessionSummary]:
    """The sessions in a folder, by name; damaged ones too."""
    try:
        folders = sorted(path for path in root.iterdir() if os.path.lexists(path / MANIFEST))
    except FileNotFoundError:
        return []
    return [describe(folder) for folder in folders]


def describe(folder: Path) -> SessionSummary:
    """What a folder's manifest says, once all files that it names are there in their sizes."""
    try:
        manifest = load_manifest(folder)
        check_files(folder, manifest)
        return SessionSummary(folder.name, folder, manifest)
    except (InputError, StorageError) as error:
        return SessionSummary(folder.name, folder, None, str(error))


def load_manifest(folder: Path) -> Manifest:
    """Read and check the manifest alone.

    Raises:
        InputError: there is none, or it is damaged, or of another version.
        StorageError: it cannot be read.
    """
    path = folder / MANIFEST
    try:
        with open(os.open(path, _READING), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise damaged(folder, f"{MANIFEST} is no plain file")
            if found.st_size > MOST_BYTES:
                raise damaged(folder, f"its manifest has {found.st_size:,} bytes, more than any of ours")
            data = file.read(found.st_size)
    except (FileNotFoundError, NotADirectoryError) as error:
        what = f"{folder} holds no session" if folder.is_dir() else f"there is no session at {folder}"
        raise NoSession(f"{what}; `offload-triforce sessions list` says what there is") from error
    except OSError as error:
        raise cannot_read(path, error) from error
    try:
        return read_manifest(data)
    except VersionError as error:
        raise OtherVersion(f"the session at {folder} {error}; read it with the version that saved it") from error
    except ManifestError as error:
        raise damaged(folder, f"its manifest {error}") from error


def check_files(folder: Path, manifest: Manifest) -> None:
    """Whether all files are there, plain ones of their sizes. None is opened.

    Raises:
        InputError: names the first that is not, and says by how much.
    """
    for file, _ in manifest.contents:
        try:
            check_file(folder, file, os.lstat(folder / file.name))
        except FileNotFoundError as error:
            raise damaged(folder, f"{file.name} is missing") from error
        except OSError as error:
            raise cannot_read(folder / file.name, error) from error


def check_file(folder: Path, file: FileEntry, found: os.stat_result) -> None:
    """Whether what was found is a plain file of the right size.

    Raises:
        InputError: it is not.
    """
    if not stat.S_ISREG(found.st_mode):
        raise damaged(folder, f"{file.name} is no plain file")
    if found.st_size != file.size:
        raise damaged(folder, f"{file.name} has {found.st_size:,} bytes, not {file.size:,}")


def open_file(folder: Path, file: FileEntry) -> int:
    """A descriptor of a plain file of the right size, for reading.

    Raises:
        InputError: it is damaged. StorageError: it cannot be read.
    """
    try:
        descriptor = os.open(folder / file.name, _READING)
    except FileNotFoundError as error:
        raise damaged(folder, f"{file.name} is missing") from error
    except OSError as error:
        raise cannot_read(folder / file.name, error) from error
    try:
        check_file(folder, file, os.fstat(descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def damaged(folder: Path, what: str) -> InputError:
    """The error of a session that cannot be used as it is."""
    return InputError(f"the session at {folder} is damaged: {what}; remove it and read its text again")


def cannot_read(path: Path, error: OSError) -> StorageError:
    """The error of a disk that does not give out what it has."""
    return StorageError(f"{path} cannot be read: {error.strerror or error}; check the disk and who may read it")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else saves to the folder or removes it meanwhile. Whoever dies lets go, whatever kills it.

    Raises:
        BusyError: somebody else is at it. StorageError: there can be no lock.
    """
    path = folder / LOCK
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error.strerror or error}; name another folder") from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BusyError(
                    f"another process is saving to {folder} right now; wait for it, or name another session"
                ) from error
            except OSError as error:
                raise StorageError(f"{path} cannot be locked: {error.strerror or error}; take another disk") from error
            if not _is_at(descriptor, path):  # it was removed as we came, and a lock on nothing keeps nobody out
                continue
            yield
            return
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def own_files(folder: Path) -> list[Path]:
    """What a save of ours has left there, finished or not, but for the manifest and the lock."""
    with os.scandir(folder) as entries:
        return [Path(entry.path) for entry in entries if OWN_FILE.fullmatch(entry.name) or entry.name == NEW_MANIFEST]


def clear_strays(folder: Path) -> None:
    """Remove what saves have left that were interrupted, or that have replaced what was there before.

    What the manifest on disk names stays, whoever wrote it; of a manifest that cannot be read, everything stays.
    """
    try:
        named = {file.name for file, _ in load_manifest(folder).contents}
    except NoSession:
        named = set()
    except (InputError, StorageError):
        return
    with contextlib.suppress(OSError):  # the next save tries again
        for path in own_files(folder):
            if path.name not in named:
                path.unlink()


def check_there(folder: Path) -> None:
    """Whether there is anything of a session, be it damaged or half written.

    Raises:
        InputError: there is not.
    """
    try:
        found = os.path.lexists(folder / MANIFEST) or bool(own_files(folder))
    except OSError:
        found = False
    if not found:
        raise NoSession(f"there is no session at {folder}; `offload-triforce sessions list` says what there is")


def check_free(folder: Path) -> None:
    """A session may be saved there: a folder that is new, empty, or a session's.

    Raises:
        InputError: it is not.
    """
    if not folder.is_dir():
        if os.path.lexists(folder):
            raise InputError(f"{folder} is a file; name a folder for the session")
        return
    if not (folder / MANIFEST).exists():
        ours = {LOCK, TRANSCRIPT, *(path.name for path in own_files(folder))}
        foreign = next((name for name in os.listdir(folder) if name not in ours), None)
        if foreign is not None:
            raise InputError(f"{folder} is a folder of something else ({foreign}); name a new or an empty one")


def check_writable(folder: Path) -> None:
    """A session can be written there, as far as that can be seen without writing; for who would find out too late.

    Raises:
        StorageError: it cannot.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise StorageError(f"nothing can be saved in {folder}: {there} may not be written to; name another folder")


def remove_text(folder: Path) -> int:
    """Remove a session, even a damaged one; returns the bytes that it took. What else is in its folder stays.

    Raises:
        InputError: there is none. BusyError: it is being saved. StorageError: the disk refuses.
    """
    check_there(folder)
    with locked(folder):
        try:
            # The manifest first: what is interrupted leaves no half session, only files for the next save to clear.
            paths = [
                path
                for path in [folder / MANIFEST, *own_files(folder), folder / TRANSCRIPT, folder / LOCK]
                if os.path.lexists(path)
            ]
            freed = sum(os.lstat(path).st_size for path in paths)
            for path in paths:
                path.unlink()
            with contextlib.suppress(OSError):  # something else is in there, or the folder is a link to another one
                folder.rmdir()
        except OSError as error:
            raise StorageError(f"{folder} cannot be removed: {error.strerror or error}") from error
    return freed
