"""The hub of models: asked once whether it answers, and quickly; where it does not, its cache on this machine serves.

Left alone, huggingface_hub repeats each request that fails five times, ever more slowly, and says so on the screen.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from offload_triforce.errors import InputError
from offload_triforce.model.names import find_known, nearest

# Seconds that the hub has to answer, looking its address up included; and for which the answer holds.
PATIENCE, HOLDS = 2.5, 60.0
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

_answers: dict[str, tuple[float, bool]] = {}  # by address: when it was asked, and what came of it


def is_here(text: str) -> bool:
    """Whether there is a file or folder of that name; ``~`` is the home folder."""
    return os.path.exists(os.path.expanduser(text))  # unlike Path's own, neither raises


def is_hub_id(text: str) -> bool:
    """Whether a text may name a model of the hub: ``owner/model``, or a name alone as some old ones have."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return _ID.fullmatch(text) is not None and not text.endswith(".gguf")


def is_reachable() -> bool:
    """Whether the hub answers: asked once, without a second try."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return False
    asked, answered = _answers.get(constants.ENDPOINT, (-HOLDS, False))
    if time.monotonic() - asked > HOLDS:
        answered = _ask(constants.ENDPOINT)
        _answers[constants.ENDPOINT] = time.monotonic(), answered
    return answered


def has_copy(repository: str) -> bool:
    """Whether the hub's cache here holds a model's configuration and all of its weights."""
    if _cached(repository, "config.json") is None:
        return False
    index = _cached(repository, "model.safetensors.index.json")
    if index is None:
        return _cached(repository, "model.safetensors") is not None
    shards = set(json.loads(index.read_text())["weight_map"].values())
    return all(_cached(repository, shard) is not None for shard in shards)


def require(repository: str) -> None:
    """Nothing, if a model can be had: the hub answers, or its cache here holds the model's configuration.

    Raises:
        InputError: neither.
    """
    if not is_hub_id(repository):
        raise InputError(
            f"{repository!r} is neither a local folder or GGUF file nor a model's name; {nearest(repository)}"
        )
    if _cached(repository, "config.json") is None and not is_reachable():
        lost = "in the hub's cache here, and the hub " + _reason()
        if find_known(repository) is not None:
            raise InputError(f"{repository} is not {lost}; connect, or give a folder or GGUF file that holds it")
        raise InputError(
            f"{repository!r} is neither a local folder or GGUF file nor {lost}; connect, or give a model that is here "
            f"({nearest(repository)})"
        )


def access(source: str) -> AbstractContextManager[None]:
    """``bounded``, unless what is to be loaded is a file or folder."""
    return nullcontext() if is_here(source) else bounded()


@contextmanager
def bounded() -> Iterator[None]:
    """While this lasts, whoever asks the hub for something gets it, or at once what its cache holds."""
    from huggingface_hub import constants

    if is_reachable():
        yield
        return
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _ask(address: str) -> bool:
    """In a thread of its own, which is left to itself when it takes too long: looking up a name knows no time limit."""
    answered = threading.Event()

    def ask() -> None:
        from huggingface_hub import get_session

        try:
            if get_session().head(address, timeout=PATIENCE).status_code < 400:
                answered.set()
        except Exception:  # of whichever library carries the request: it did not answer
            return

    thread = threading.Thread(target=ask, daemon=True, name="hub")
    thread.start()
    thread.join(PATIENCE)
    return answered.is_set()


def _reason() -> str:
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return "is not to be asked (HF_HUB_OFFLINE)"
    return "cannot be reached"


def _cached(repository: str, file: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, file)
    return Path(found) if isinstance(found, str) else None
