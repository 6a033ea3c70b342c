"""The commands ``sessions list``, ``show``, ``rm`` and ``verify``: of names and of paths, whole and damaged."""

import json
import os
import subprocess
import sys

import pytest

from offload_triforce.machine.folders import sessions_folder
from offload_triforce.runtime.session_files import save_text
from offload_triforce.runtime.session_folder import MANIFEST, load_manifest, locked, session_path
from tests.cli.calling import call, check_mistake, refused
from tests.runtime.saved_texts import IDENTITY, make_text


@pytest.fixture(autouse=True)
def empty(monkeypatch, tmp_path):
    monkeypatch.setenv("OFFLOAD_TRIFORCE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def kept(tmp_path):
    """Two by name, one elsewhere."""
    for name, tokens in (("report", 5000), ("a.b_c-d", 40)):
        save_text(sessions_folder() / name, make_text(tokens, every=2000), IDENTITY)
    save_text(tmp_path / "elsewhere" / "third", make_text(30), IDENTITY)
    return str(tmp_path / "elsewhere" / "third")


def damage(name):
    folder = session_path(name)
    path = folder / load_manifest(folder).shards[0][0].name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_where_they_are(monkeypatch, tmp_path):
    assert sessions_folder() == tmp_path / "cache" / "sessions"
    monkeypatch.delenv("OFFLOAD_TRIFORCE_CACHE")
    monkeypatch.setenv("HOME", "/home/me")
    assert str(sessions_folder()) == "/home/me/.cache/offload-triforce/sessions"
    assert str(session_path("~/x")) == "/home/me/x"
    assert str(session_path("./x")) == "x"


def test_list(kept):
    listed = call("sessions", "list")
    assert listed.exit_code == 0
    rows = [line.split() for line in listed.stdout.splitlines()[1:]]
    assert [(row[0], row[1]) for row in rows] == [("a.b_c-d", "40"), ("report", "5,000")]
    assert "ToyForCausalLM" in listed.stdout
    assert max(map(len, listed.stdout.splitlines())) <= 80
    found = json.loads(call("sessions", "list", "--json").stdout)
    assert found["folder"] == str(sessions_folder())
    assert [(row["name"], row["tokens"], row["problem"]) for row in found["sessions"]] == [
        ("a.b_c-d", 40, None),
        ("report", 5000, None),
    ]


def test_list_nothing():
    listed = call("sessions", "list")
    assert (listed.exit_code, listed.stdout) == (0, "")
    assert "there are none" in listed.stderr
    assert json.loads(call("sessions", "list", "--json").stdout)["sessions"] == []


def test_list_shows_damaged_ones_too(kept):
    (session_path("report") / MANIFEST).write_text("{")
    assert "damaged" in call("sessions", "list").stdout
    row = json.loads(call("sessions", "list", "--json").stdout)["sessions"][1]
    assert "is damaged" in row["problem"]
    refused("sessions", "show", "report", words="is damaged")


def test_show(kept):
    shown = call("sessions", "show", "report").stdout
    assert "5,000" in shown
    assert "2 layers of 2 KV heads of 4, bfloat16" in " ".join(shown.split())
    row = json.loads(call("sessions", "show", "report", "--json").stdout)
    assert row["checkpoints"] == [2000, 4000, 5000]
    assert row["bytes"] == load_manifest(session_path("report")).size
    assert row["files"] == 2 * 2 + 3 + 2
    assert json.loads(call("sessions", "show", kept, "--json").stdout)["tokens"] == 30


def test_rm(kept):
    asked = call("sessions", "rm", "report", input="n\n")
    assert asked.exit_code == 130
    assert "5,000 tokens" in asked.output
    assert session_path("report").exists()
    assert call("sessions", "rm", "report", input="y\n").exit_code == 0
    assert not session_path("report").exists()
    (session_path("a.b_c-d") / MANIFEST).write_text("{")  # a damaged one too
    gone = call("sessions", "rm", "a.b_c-d", kept, "--yes")
    assert (gone.exit_code, gone.stdout) == (0, "")
    assert gone.stderr.count("removed ") == 2
    assert not os.path.exists(kept)
    refused("sessions", "rm", kept, words="there is no session")
    refused("sessions", "rm", "report", "--yes", words="there is no session")


def test_rm_of_one_that_is_being_saved(kept):
    with locked(session_path("report")):
        refused("sessions", "rm", "report", "--yes", words="another process is saving")
    assert session_path("report").exists()


def test_rm_leaves_what_is_not_ours(kept, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "one.jpg").write_text("x")
    refused("sessions", "rm", str(folder), "--yes", words="there is no session")
    assert os.listdir(folder) == ["one.jpg"]


def test_verify(kept):
    verified = call("sessions", "verify")
    assert verified.exit_code == 0
    assert [line.split(": ")[1].split(",")[0] for line in verified.stdout.splitlines()] == ["whole"] * 2
    assert call("sessions", "verify", "report", kept).stdout.count("whole") == 2
    damage("report")
    refused("sessions", "verify", "report", words="does not have the checksum")
    all_of_them = call("sessions", "verify")
    assert all_of_them.exit_code == 2
    assert all_of_them.stdout.count("whole") == 1
    assert "1 of 2 sessions are damaged" in all_of_them.stderr


@pytest.mark.parametrize("name", ["..", ".", ".hidden", "-x", "a b", "a\nb", "ä", "x" * 65, "", "a\0b", "~"])
@pytest.mark.parametrize("command", ["show", "rm", "verify"])
def test_names_that_are_none(command, name):
    check_mistake(call("sessions", command, "--", name), "cannot be the name of a session")


def test_without_torch():
    """They are there to be quick."""
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom offload_triforce import cli\n"
        "for line in (['list'], ['show', 'x'], ['rm', 'x'], ['verify']):\n"
        "    CliRunner().invoke(cli.app, ['sessions', *line])\n"
        "print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr
