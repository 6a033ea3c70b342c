"""Help: everywhere, at once, with examples that are commands."""

import shlex
import subprocess
import sys

import pytest
import typer.main
from typer.testing import CliRunner

from offload_triforce import __version__, cli
from tests.cli.calling import call, check_mistake

ROOT = typer.main.get_command(cli.app)


def commands(group=ROOT, path=()):
    """(words, command) of every command, groups too."""
    yield path, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


TREE = dict(commands())
LEAVES = {path: command for path, command in TREE.items() if not hasattr(command, "commands")}


@pytest.mark.parametrize("path", TREE, ids=" ".join)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_everywhere(path, flag):
    result = call(*path, flag)
    assert result.exit_code == 0
    assert "Usage: " in result.stdout
    for name in getattr(TREE[path], "commands", {}):
        assert name in result.stdout
    if path in LEAVES or not path:
        assert "Examples:" in result.stdout


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_examples_are_commands(path):
    """Each is accepted by the parser, and is about the command that it explains."""
    lines = LEAVES[path].epilog.split("\n\n")[1:]
    assert lines
    for line in lines:
        words = shlex.split(line)
        words = words[words.index("offload-triforce") + 1 :]
        assert tuple(words[: len(path)]) == path
        assert len(line) < 80
        context = LEAVES[path].make_context("x", words[len(path) :], resilient_parsing=True)
        known = {option for param in LEAVES[path].params for option in (*param.opts, *param.secondary_opts)}
        assert {word for word in words if word.startswith("-")} <= known
        assert not context.args


def test_a_group_alone_shows_what_it_holds():
    for path, group in TREE.items():
        if path not in LEAVES:
            result = call(*path)
            assert result.exit_code in (0, 2)
            assert all(name in result.output for name in group.commands)


def test_version():
    assert call("--version").stdout == f"{__version__}\n"


def test_without_torch():
    """Help has to come at once."""
    code = "import sys; from offload_triforce import cli; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "offload_triforce", "-h"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "Usage: offload-triforce" in done.stdout


def test_completion():
    """typer's own; it has to get past our way of ending."""
    result = CliRunner().invoke(
        cli.app,
        [],
        prog_name="offload-triforce",
        env={"_OFFLOAD_TRIFORCE_COMPLETE": "complete_bash", "COMP_WORDS": "offload-triforce gen", "COMP_CWORD": "1"},
    )
    assert result.exit_code == 0
    assert result.stdout.split() == ["generate"]


def test_a_command_that_is_none():
    check_mistake(call("genrate"), "'generate'")
    check_mistake(call("bench", "nothing"), "see ")


def test_an_option_that_is_none():
    check_mistake(call("generate", "--model", "x", "--prompt", "x", "--chatty"), "no such option: --chatty")
