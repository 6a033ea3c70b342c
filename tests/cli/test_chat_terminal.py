"""``chat`` on a real terminal: keys, streaming, Ctrl-C, commands, the line at the bottom."""

import re
import sys

import pytest

from tests.cli.calling import SMALL
from tests.cli.terminal import Terminal

ESCAPE, UP, CTRL_C, CTRL_D = "\x1b", "\x1b[A", "\x03", "\x04"


@pytest.fixture
def start(chatting, tmp_path):
    """A conversation with the tiny model; over a link so slow that an answer comes token by token, if ``slow``."""
    begun = []

    def make(*options, slow=False, variables=None, **size):
        link = ("--link-gbps", "0.002", "--gamma", "0", "--draft", "none") if slow else ()
        command = [sys.executable, "-m", "offload_triforce", "chat", "--model", chatting, *SMALL, *link, *options]
        terminal = Terminal(command, OFFLOAD_TRIFORCE_CACHE=str(tmp_path), **{**size, **(variables or {})})
        begun.append(terminal)
        terminal.wait("tokens used")
        return terminal

    yield make
    for terminal in begun:
        terminal.process.kill()
        terminal.process.wait()


def answering(text):
    """Characters of an answer that is still coming: neither the prompt's bar nor the line at the bottom are there."""
    waiting = "reading the prompt" in text or "tokens used" in text
    return 0 if waiting else len(text.partition("time\n")[2].strip())


def test_a_conversation(start, tmp_path):
    terminal = start("--max-new-tokens", "1000", slow=True)
    terminal.type("Once upon a time\r")
    terminal.wait(lambda text: answering(text) > 3)
    assert terminal.process.poll() is None
    terminal.type(CTRL_C)
    terminal.wait("stopped; what was said is kept")
    terminal.wait(re.compile(r"\d+ of 4,096 tokens used \| 0 reused \| 1\.0 tokens per pass \| \d+\.\d tok/s").search)

    terminal.type("/set max_new_tokens 3\r")
    terminal.wait("max_new_tokens = 3")
    terminal.type("/set temprature 1\r")
    terminal.wait("did you mean temperature?")
    terminal.type("/retry\r")
    terminal.wait("at its limit of 3 tokens")
    terminal.type("/undo\r")
    terminal.wait("taken back: Once upon a time")
    terminal.type("/undo\r")
    terminal.wait("error: nothing has been answered yet")
    terminal.type("/file gone.txt\r")
    terminal.wait("error: no such file: gone.txt")
    terminal.type("/stats\r")
    terminal.wait("0 answers, 0 of 4,096 tokens")

    terminal.type(UP * 7 + "\r")  # the first thing that was typed
    terminal.wait(lambda text: text.count("> Once upon a time") == 2 and text.count("at its limit of 3 tokens") == 2)
    terminal.type("half of a" + CTRL_C)
    terminal.type(CTRL_C)
    terminal.wait("Ctrl-C again, or Ctrl-D, leaves")
    terminal.type("/exit\r")
    assert terminal.close() == 0
    assert "Traceback" not in terminal.text
    history = tmp_path / "chat_history"
    assert "+Once upon a time" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


def test_lines_and_completion(start):
    """On a narrow terminal without colours, which changes its size meanwhile."""
    terminal = start("--max-new-tokens", "2", columns=40, variables={"NO_COLOR": "1"})
    terminal.type("naïve 日本" + ESCAPE + "\rsecond")
    terminal.wait("  second")
    terminal.type(f"{ESCAPE}[200~\nthird\nfourth{ESCAPE}[201~")  # pasted
    terminal.wait("  fourth")
    terminal.resize(70, 24)
    assert "cut at its limit" not in terminal.text
    terminal.type("\r")
    terminal.wait("cut at its limit of 2 tokens")
    terminal.wait("tokens per pass")  # it listens again
    terminal.type("/und")
    terminal.wait("take the last question")  # what it is, beside the word
    terminal.type("\t")
    terminal.wait("> /undo")
    terminal.type("\r\r")  # taken, and sent
    terminal.wait("taken back: naïve 日本 second third fourth")
    terminal.wait(" 0 of 4,096 tokens used")  # it listens again
    terminal.type(CTRL_C)
    terminal.wait("Ctrl-C again")
    terminal.type(CTRL_C)
    assert terminal.close() == 0
    colours = [code for code in re.findall(rb"\x1b\[([0-9;]*)m", terminal.raw) if re.search(rb"(^|;)[349][0-7]", code)]
    assert colours == []


def test_ctrl_d_leaves_and_the_conversation_is_kept(start):
    terminal = start("--session", "one", "--max-new-tokens", "2")
    terminal.type("Hi\r")
    terminal.wait("cut at its limit")
    terminal.wait(re.compile(r"tok/s \| one").search)
    terminal.type(CTRL_D)
    assert terminal.close() == 0
    assert "kept as one" in terminal.text
