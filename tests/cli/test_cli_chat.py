"""The command ``chat`` through a pipe: lines in, answers on standard output, everything else on standard error."""

import json
import os
import signal
import subprocess
import sys

import pytest

from offload_triforce import TriForce
from offload_triforce.generation.transcript import FILE
from tests.cli.calling import SMALL, call, refused

FEW = ("--max-new-tokens", "6", *SMALL)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFLOAD_TRIFORCE_CACHE", str(tmp_path))
    return tmp_path / "sessions"


def chat(model, *lines, options=FEW, code=0):
    """(answers, what was told) of a conversation."""
    result = call("chat", "--model", model, *options, input="".join(f"{line}\n" for line in lines))
    assert result.exit_code == code, result.stderr
    assert "\x1b" not in result.stdout + result.stderr
    return result.stdout, result.stderr


def alone(model, messages, **options):
    """What an engine of its own answers."""
    with TriForce.load(model, budget=128, tile=64, draft_cache=64) as engine:
        return engine.generate(messages, max_new_tokens=6, **options).text


def test_answers_are_those_of_a_fresh_engine(chatting):
    said, told = chat(chatting, "Hi there.", "And now?")
    first = alone(chatting, [{"role": "user", "content": "Hi there."}])
    past = [{"role": "user", "content": "Hi there."}, {"role": "assistant", "content": first.strip()}]
    second = alone(chatting, [*past, {"role": "user", "content": "And now?"}])
    assert said == f"{first}\n\n{second}\n\n"
    assert "cut at its limit of 6 tokens" in told


def test_what_was_read_is_not_read_again(chatting, book):
    _, told = chat(chatting, "/stats", "Who?", "/stats", "And?", "/stats", options=("--file", book, *FEW))
    assert "book.txt: 636 tokens" in told
    reused = [int(line.split(": ")[1].split()[0].replace(",", "")) for line in told.splitlines() if "reused" in line]
    assert reused[0] == 0
    assert reused[1] > 636


def test_a_mistake_ends_nothing_but_shows_in_the_exit_code(chatting):
    said, told = chat(chatting, "/nothing", "/set temperature hot", "Hi", code=2)
    assert said.strip()
    assert [line for line in told.splitlines() if line.startswith("error: ")] == [
        "error: there is no command /nothing; /help lists what there is",
        "error: temperature must be a number of at least 0, not hot",
    ]


def test_sampling_seed_and_retry(chatting):
    options = ("--temperature", "5", "--seed", "3", *FEW)
    first, _ = chat(chatting, "Hi", "/retry", options=options)
    second, _ = chat(chatting, "Hi", "/retry", options=options)
    assert first == second
    message = [{"role": "user", "content": "Hi"}]
    one, other = (alone(chatting, message, temperature=5.0, seed=seed) for seed in (3, 4))
    assert one != other
    assert first == f"{one}\n\n{other}\n\n"


def test_system_instructions(chatting, folder):
    chat(chatting, "Hi", options=("--system", "S", "--session", "one", *FEW))
    kept = json.loads((folder / "one" / FILE).read_text())
    assert [message["role"] for message in kept["messages"]] == ["system", "user", "assistant"]
    refused("chat", "--model", chatting, "--system", "no", *FEW, words="not with me", input="Hi\n")


def test_a_session_goes_on(chatting, folder):
    first, told = chat(chatting, "Hi there.", options=("--session", "one", *FEW))
    assert "one is new" in told
    assert "kept as one" in told
    second, told = chat(chatting, "And now?", options=("--session", "one", *FEW))
    assert "one: 1 answer, the last to: Hi there." in told
    assert (first, second) == tuple(
        f"{part}\n\n" for part in chat(chatting, "Hi there.", "And now?")[0].split("\n\n")[:2]
    )
    other = call("chat", "--model", chatting, "--system", "S", "--session", "one", *FEW, input="Hi\n")
    assert other.exit_code == 2
    assert "has begun with other instructions" in other.stderr
    assert len(json.loads((folder / "one" / FILE).read_text())["messages"]) == 4


def test_a_model_without_a_chat_template(model):
    said, told = chat(model, "Hi")
    assert "this model has no chat template" in told
    expected = alone(model, "User: Hi\n\nAssistant:", stop="\nUser:").removesuffix("\nUser:")
    assert said == f"{expected}\n\n"


def test_mistakes_on_the_command_line(chatting, tmp_path, monkeypatch):
    monkeypatch.setattr("offload_triforce.engine.TriForce.load", lambda *_: pytest.fail("loaded"))
    for options, words in (
        (("--file", tmp_path / "gone"), "no such file"),
        (("--file", "-"), "name a file"),
        (("--session", "up*"), "cannot be the name"),
        (("--temperature", "inf"), "finite number"),
        (("--max-new-tokens", "0"), "at least 1"),
        (("--config", tmp_path / "gone.json"), "no such file"),
    ):
        refused("chat", "--model", chatting, *options, words=words, input="")


def test_a_document_that_is_too_long(chatting, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("word " * 1000)
    refused("chat", "--model", chatting, "--file", path, words="904 more than the 4,096", input="")


def test_a_line_that_is_no_text(chatting):
    result = call("chat", "--model", chatting, *FEW, input=b"\xff\xfe\nHi\n")
    assert result.exit_code == 2
    assert "this line is not UTF-8 text" in result.stderr
    assert result.stdout.strip()


def test_ctrl_c_stops_an_answer_and_not_the_program(chatting):
    """A real signal to a real process whose standard input is a pipe that stays open."""
    deaf = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{deaf}; from offload_triforce import cli; cli.main()"
    args = ["chat", "--model", chatting, "--max-new-tokens", "2000", "--draft", "none", "--gamma", "0", *SMALL]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *args, "--link-gbps", "0.0003"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    process.stdin.write(b"Once upon a time\n")
    process.stdin.flush()
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    said, told = process.communicate(b"/undo\n/exit\n", timeout=120)
    assert process.returncode == 0, told.decode()
    assert "stopped; what was said is kept" in told.decode()
    assert "taken back: Once upon a time" in told.decode()
    assert said.endswith(b"\n\n")
