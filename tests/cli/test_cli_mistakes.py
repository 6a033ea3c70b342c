"""Every option of every command, given nonsense: one sentence and exit code 2, or it works; never a traceback."""

import os
import typing

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload_triforce import TriForceError, cli
from offload_triforce.model.loader import load_model
from tests.cli.calling import FEW, call, refused
from tests.cli.test_cli_help import LEAVES

HUGE = "1" + 30 * "0"
NUMBERS = ["", "x", "--", "nan", "0x10", "1_", "½", "1,5", "\udcff", "[/x]"]
WHOLE = [*NUMBERS, "1.5", "inf", "1e3", "-1", "0", f"-{HUGE}", HUGE, "9" * 5000]
REAL = [*NUMBERS, "inf", "-inf", "NaN", "-1", "0", "1e-320", "1e308", "1e400", HUGE, "-0.0"]
WORDS = ["", " ", "x", "-", "--", "nan", "/", "/dev/null", "/dev/full", "/proc/self/mem", "~nobody-of-that-name/x"]
WORDS += ["a" * 5000, "[/x]", "[bnb]", "\udcff", "a\nb", "{}", "../..", "RTX 4090", HUGE, "-1", "9" * 5000 + "GB"]
BASE = {
    ("generate",): ("--model", "{model}", "--prompt", "Once", "--max-new-tokens", "2", *FEW[2:]),
    ("plan",): ("--model", "llama-3.1-8b", "--gpu", "RTX 4090", "--ram", "64GB"),
    ("bench", "throughput"): ("--model", "{model}", "--context", "1000"),
    ("bench", "prediction"): ("--model", "{model}"),
}
# What the name of a function's parameter becomes is the parser's affair; what kind it is, the function's.
FUNCTIONS = {(command.callback.__name__,): command.callback for command in cli.app.registered_commands}
FUNCTIONS |= {
    ("sessions", command.name or command.callback.__name__): command.callback
    for command in cli.kept.registered_commands
}
FUNCTIONS |= {("bench", command.callback.__name__): command.callback for command in cli.bench.registered_commands}


def kinds():
    """(command, option, kind of its values) of everything that takes a value."""
    for path, function in FUNCTIONS.items():
        hints = typing.get_type_hints(function)
        options = {param.name: max(param.opts, key=len) for param in LEAVES[path].params}
        for name, hint in hints.items():
            inner = typing.get_args(hint)
            parts = {hint, *inner, *(arg for part in inner for arg in typing.get_args(part))}
            kind = next((kind for kind in (int, float, bool) if kind in parts), str)
            if name in options and kind is not bool:
                yield path, options[name], kind


OPTIONS = sorted(kinds(), key=str)
VALUES = {int: WHOLE, float: REAL, str: WORDS}


def test_all_options_are_known():
    """The net that catches them has no hole: all commands, and all of their options but flags."""
    assert set(FUNCTIONS) == set(LEAVES)
    found = {(path, option) for path, option, _ in OPTIONS}
    for path, command in LEAVES.items():
        for param in command.params:
            flag = getattr(param, "is_flag", False) or param.name == "help"
            assert flag or (path, max(param.opts, key=len)) in found, (path, param.name)


@pytest.fixture(scope="module", autouse=True)
def quick(model, tmp_path_factory):
    """The work itself is left out, but for ``generate``, whose model is read once."""

    def begins(*args, **options):
        raise TriForceError("the work begins")

    loaded = {}

    def load(source, dtype, *others):
        key = (source, dtype, *others)
        if source != model:
            return load_model(source, dtype, *others)
        if key not in loaded:
            loaded[key] = load_model(*key)
        return loaded[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("offload_triforce.engine.load_model", load)
        for module in ("cli.demonstration", "bench.pipeline"):
            patch.setattr(f"offload_triforce.{module}.fetch_model", begins)
        patch.setattr("offload_triforce.model.fetch.is_reachable", lambda: False)
        for module in ("bench.stage", "bench.prediction", "bench.speculation"):
            patch.setattr(f"offload_triforce.{module}.TriForce", type("Engine", (), {"load": staticmethod(begins)}))
        patch.setattr("offload_triforce.bench.pipeline.random_model", begins)
        patch.setattr("offload_triforce.machine.doctor.measure", lambda: ({}, []))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.chdir(tmp_path_factory.mktemp("here"))
        patch.setenv("OFFLOAD_TRIFORCE_CACHE", str(tmp_path_factory.mktemp("cache")))  # where sessions are begun
        yield


def check_ending(result, reports=False):
    """``reports``: what was found whole may stand before the sentence about what was not."""
    assert result.exit_code in (0, 2), result.output
    assert "Traceback" not in result.output
    if result.exit_code == 2:
        lines = result.stderr.splitlines()
        assert lines[-1].startswith("error: "), result.stderr
        assert not any(line.startswith("error: ") for line in lines[:-1])
        assert result.stdout == "" or reports or "on standard output instead" in lines[-1]


def run(path, model, *options):
    result = call(*path, *(arg.format(model=model) for arg in BASE.get(path, ())), *options)
    check_ending(result, reports=path == ("sessions", "verify"))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_an_option_with_nonsense(data, model):
    path, option, kind = data.draw(st.sampled_from(OPTIONS))
    run(
        path,
        model,
        option,
        data.draw(st.sampled_from(VALUES[kind]) | st.text(max_size=6).filter(lambda t: "\0" not in t)),
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_two_options_with_nonsense(data, model):
    path = data.draw(st.sampled_from(sorted(FUNCTIONS)))
    mine = [(option, kind) for owner, option, kind in OPTIONS if owner == path]
    words = []
    for option, kind in data.draw(st.lists(st.sampled_from(mine), min_size=2, max_size=2)) if mine else ():
        words += [option, data.draw(st.sampled_from(VALUES[kind]))]
    run(path, model, *words)


@pytest.mark.parametrize("path", FUNCTIONS, ids=" ".join)
def test_options_that_are_none(path):
    for option in ("--nothing", "--modle", "-q", "---"):
        refused(*path, option, words="no such option")
    base = ("--model", "x") if path in (("generate",), ("chat",), ("serve",), ("plan",)) else ()
    base = ("name",) if path[0] == "sessions" and path != ("sessions", "list") else base
    if path not in (("sessions", "rm"), ("sessions", "verify")):  # which take any number of names
        refused(*path, *base, "surplus", words="unexpected extra argument")


@pytest.mark.parametrize(("path", "option", "kind"), [row for row in OPTIONS if row[2] is not str], ids=str)
def test_numbers_that_are_none(path, option, kind):
    """The parser's own mistakes: before anything is imported."""
    for value in ("", "x", "0x10", "1,5", *(("1.5", "1e3", "inf") if kind is int else ())):
        refused(*path, option, value, words=option)


@pytest.mark.parametrize(("path", "option"), [row[:2] for row in OPTIONS if row[2] is float], ids=str)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1"])
def test_floats_that_mean_nothing(path, option, value, model):
    """None of them is taken for a number. An answer's temperature, a link's speed and so on must be finite."""
    base = [arg.format(model=model) for arg in BASE.get(path, ())]
    refused(*path, *base, option, value)


FILES = [
    (("generate",), "--output"),
    (("trace",), "--out"),
    (("trace",), "--png"),
    (("bench", "speculation"), "--out"),
    (("bench", "speculation"), "--png"),
    (("bench", "throughput"), "--out"),
    (("bench", "throughput"), "--png"),
    (("bench", "prediction"), "--out"),
]


@pytest.mark.parametrize(("path", "option"), FILES, ids=str)
def test_files_that_could_not_be_written(path, option, model, tmp_path):
    """Before the work, and without a trace of the attempt."""
    base = [arg.format(model=model) for arg in BASE.get(path, ())]
    (tmp_path / "a.png").mkdir()
    for name, words in (
        (tmp_path / "a.png", "is a folder"),
        (tmp_path / "none" / "a.png", "does not exist"),
        ("/proc/a.png", "cannot be written"),
        ("a" * 300 + ".png", "cannot be written: File name too long"),
    ):
        refused(*path, *base, option, name, words=words)
    kept = tmp_path / "kept.png"
    kept.write_text("of value")
    new = tmp_path / "new.png"
    for name in (kept, new):  # the work begins, and nothing more
        result = call(*path, *base, option, name)
        assert path == ("generate",) or "the work begins" in result.stderr, result.stderr
    if path != ("generate",):
        assert kept.read_text() == "of value"
        assert not new.exists()


@pytest.mark.parametrize("path", [path for path, option in FILES if option == "--png"], ids=" ".join)
def test_pictures_that_nobody_can_draw(path, model, tmp_path):
    base = [arg.format(model=model) for arg in BASE.get(path, ())]
    for name in ("picture", "picture.txt", "picture.json"):
        refused(*path, *base, "--png", tmp_path / name, words="no picture's name")


def test_a_working_directory_that_cannot_be_written(monkeypatch):
    monkeypatch.chdir("/proc")
    refused("trace", words="trace.json cannot be written")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path, monkeypatch):
    tmp_path.chmod(0o500)
    refused("trace", "--out", tmp_path / "a.json", words="cannot be written: Permission denied")
    monkeypatch.chdir(tmp_path)
    refused("trace", words="trace.json cannot be written: Permission denied")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b'{"gamma": NaN}', b"\xff\xfe{\0}\0", b"[" * 10**5, b"\0" * 9]
)
@pytest.mark.parametrize("option", ["--config", "--prompt-file", "--model", "--draft"])
def test_files_of_nonsense(option, content, model, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(content)
    base = ("--model", model) if option == "--prompt-file" else ("--model", model, "--prompt", "x")
    check_ending(call("generate", *base, *FEW, option, path))


@pytest.mark.parametrize(
    "values",
    [
        '{"gamma": NaN}',
        '{"gamma": 1e400}',
        '{"gamma": "4"}',
        '{"gamma": true}',
        '{"gamma": null}',
        '{"resident": "x"}',
        '{"link_gbps": Infinity}',
        '{"link_gbps": []}',
        '{"rule": []}',
        '{"bits": {}}',
        '{"tile": 1.5}',
        '{"": 1}',
        '{"draft_cost": "x"}',
        '{"draft_cost": Infinity}',
        '{"gamma": ' + "9" * 5000 + "}",
    ],
)
def test_settings_of_nonsense(values, model, tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(values)
    refused("generate", "--model", model, "--prompt", "x", *FEW[:2], "--config", path)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["trace", "--queries", "1000"], "a pass of 1,000 queries is larger than passes are, 193"),
        (["trace", "--tokens", "9000"], "9,000 tokens are more than the 8,192 positions of smollm2"),
        (["trace", "--model", "gpt"], "unknown model 'gpt'"),
        (["bench", "pipeline", "--queries", HUGE], "larger than passes are"),
        (["bench", "pipeline", "--model", "llama-1b", "--tokens", "200K"], "131,072 positions of llama-1b"),
        (["bench", "pipeline", "--model", "smollm2", "--model", "x"], "unknown model 'x'"),
    ],
)
def test_refused_before_anything_is_read(args, words):
    refused(*args, words=words)
