"""Errors that a user can act on. Each message is one sentence: what is wrong, by how much, what would work."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """What another library's error says first, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class TriForceError(Exception):
    """Base of every error that is the input's fault and not the program's."""


class InputError(TriForceError, ValueError):
    """A setting, prompt or file that cannot be used as given."""


class UnsupportedModelError(TriForceError):
    """A model or feature that this runtime refuses by name."""


class MemoryLimitError(TriForceError):
    """The request needs more host or device memory than there is."""


class BusyError(TriForceError):
    """An engine or a model is in use, and the caller does not want to wait, or could wait for ever."""


class StorageError(TriForceError):
    """The disk is full, or cannot be read or written: what lay there before is as it was."""
