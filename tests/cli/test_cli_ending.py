"""Ends that are nobody's fault: full disks, closed pipes and streams, terminals that lack a character."""

import contextlib
import io
import os
import subprocess
import sys

import pytest
from rich.console import Console

from offload_triforce import cli
from offload_triforce.cli import ending
from tests.cli.calling import FEW, call, generate, refused

COMMANDS = {
    "version": ["--version"],
    "help": ["generate", "--help"],
    "text": ["generate", "--model", "{model}", "--prompt", "Once", *FEW],
    "json": ["generate", "--model", "{model}", "--prompt", "Once", *FEW, "--json"],
    "table": ["plan", "--model", "llama-3.1-8b", "--gpu", "RTX 4090", "--ram", "64GB"],
    "list": ["plan", "--list"],
    "findings": ["doctor"],
}


def run(monkeypatch, stream, args, model):
    """Exit code of a command whose standard output is ``stream``; what it says on standard error."""
    told = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", told)
    with pytest.raises(SystemExit) as stopped:
        cli.app([model if arg == "{model}" else arg for arg in args])
    monkeypatch.undo()
    return stopped.value.code, told.getvalue()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_one_sentence(name, model, monkeypatch):
    with open("/dev/full", "w") as full:
        code, told = run(monkeypatch, full, COMMANDS[name], model)
    assert code == 2
    assert told.splitlines()[-1] == "error: the output could not be written: No space left on device"
    assert told.count("error") == 1
    assert "Traceback" not in told


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "help"])
def test_a_closed_pipe_is_no_mistake(name, model, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with contextlib.suppress(BrokenPipeError), os.fdopen(write, "w") as pipe:
        code, told = run(monkeypatch, pipe, COMMANDS[name], model)
    assert code in (1, ending.PIPE_CLOSED)  # 1 is how typer and rich themselves end then
    assert code != 1 or name in ("version", "table", "list")
    assert "error" not in told
    assert "Traceback" not in told


@pytest.mark.parametrize("args", [["--version"], ["--help"]])
@pytest.mark.parametrize("where", ["/dev/full", "|"])
def test_nothing_is_said_as_the_interpreter_exits(args, where):
    """It writes what it holds back once more: a process of its own shows it."""
    command = f"{sys.executable} -m offload_triforce {' '.join(args)} " + ("| true" if where == "|" else f"> {where}")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    if where != "|":
        assert done.returncode == 2
        assert done.stderr == "error: the output could not be written: No space left on device\n"


def test_standard_output_that_is_closed(model, monkeypatch, tmp_path):
    """Refused before the work, unless the answer goes to a file."""
    monkeypatch.setattr("offload_triforce.engine.TriForce.load", lambda *_: pytest.fail("loaded"))
    code, told = run(monkeypatch, None, COMMANDS["text"], model)
    assert code == 2
    assert told == "error: standard output is closed; give --output, or leave it open\n"
    code, told = run(monkeypatch, None, [*COMMANDS["text"], "--output", str(tmp_path / "a")], model)
    assert code == 0, told
    assert (tmp_path / "a").read_text().strip()


@pytest.mark.parametrize("stream", [None, "/dev/full"])
def test_standard_error_that_is_closed_or_full_stops_nothing(stream, model, monkeypatch):
    expected = generate("--model", model, "--prompt", "Once", *FEW).stdout
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", stream and open(stream, "w", buffering=1))  # noqa: SIM115
    with pytest.raises(SystemExit) as stopped:
        cli.app(["generate", "--model", model, "--prompt", "Once", *FEW])
    monkeypatch.undo()
    assert stopped.value.code == 0
    assert out.getvalue() == expected


def test_a_terminal_that_lacks_a_character(model, monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    code, told = run(monkeypatch, narrow, COMMANDS["text"], model)
    assert code == 0, told
    assert b"?" in narrow.buffer.getvalue()


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (PermissionError(13, "Permission denied", "/some/file"), "/some/file: Permission denied"),
        (OSError("no such host"), "no such host"),
        (MemoryError(), "memory ran out"),
        (MemoryError("Unable to allocate\n7 GiB"), "memory ran out: Unable to allocate 7 GiB"),
    ],
)
def test_other_ends(error, sentence, monkeypatch):
    told = io.StringIO()
    monkeypatch.setattr(ending, "notes", Console(file=told, width=20))
    assert ending.end(error) == 2
    assert told.getvalue() == f"error: {sentence}\n"


def test_a_bug_is_still_a_traceback(monkeypatch):
    """It is the program's fault, and its place must be known."""
    monkeypatch.setattr("offload_triforce.machine.doctor.examine", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call("doctor")


@pytest.mark.parametrize("name", ["[bnb]", "[/nothing]", "[red]x", ":smile:"])
def test_brackets_in_names_are_no_markup(name, model):
    refused("generate", "--model", f"./{name}", "--prompt", "x", words=f"no such file or folder: ./{name}")
    refused("generate", "--model", model, "--prompt-file", name, words=f"no such file: {name}")


def test_brackets_in_findings(monkeypatch):
    monkeypatch.setattr("offload_triforce.machine.doctor.importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("COLUMNS", "200")
    assert "pip install 'offload-triforce[bnb]'" in call("doctor").stdout
