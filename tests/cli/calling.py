"""Commands called in this process, and what must hold of every mistake."""

from typer.testing import CliRunner

from offload_triforce import cli

SMALL = ("--budget", "128", "--tile", "64", "--draft-cache", "64")
FEW = ("--max-new-tokens", "4", *SMALL)


def call(*args, input=None):
    """The outcome of ``offload-triforce ARGS``; a bug in the program is raised."""
    result = CliRunner().invoke(cli.app, [str(arg) for arg in args], input=input)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def generate(*args, input=None):
    return call("generate", *args, input=input)


def check_mistake(result, words=""):
    """One sentence on standard error, nothing on standard output, exit code 2."""
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: "), result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.endswith("\n")
    assert words in result.stderr
    assert result.stdout == ""


def refused(*args, words="", input=None):
    check_mistake(call(*args, input=input), words)
