"""The command: a process that serves, and ends as it should."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys

import httpx
import pytest

from offload_triforce.cli import serve
from tests.byte_tokenizer import save_tiny_llama
from tests.cli.calling import call
from tests.server.conftest import TEMPLATE

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 1.0, "seed": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_tiny_llama(tmp_path_factory.mktemp("model"), eos_token_id=None)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@contextlib.contextmanager
def process(folder, *options):
    """(process, address)."""
    words = ["serve", "--model", str(folder), "--name", "tiny", "--port", "0", "--budget", "128", *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "offload_triforce", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=env) as running:
        try:
            found = None
            while found is None:
                line = running.stderr.readline()
                assert line, "it ended"
                found = re.search(r"running on (http://\S+)", line)
            yield running, found[1]
        finally:
            running.kill()


def test_a_signal_lets_an_answer_end(folder):
    with process(folder, "--grace", "60") as (running, address):
        body = {**CHAT, "max_tokens": 600, "stream": True}
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            running.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert "data: [DONE]" in rest
        assert any('"finish_reason":"length"' in line for line in rest)
        assert running.wait(60) == 0
        assert "API key" not in running.stderr.read()


def test_what_was_read_is_there_for_the_next_server(folder, tmp_path):
    """It is saved at SIGTERM."""
    used = []
    for _ in range(2):
        with process(folder, "--session-dir", str(tmp_path)) as (running, address):
            body = {"messages": [{"role": "user", "content": "A document. " * 30}], "max_tokens": 2, "temperature": 0}
            answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
            used.append((answer["usage"]["prompt_tokens_details"]["cached_tokens"], answer["choices"]))
            running.send_signal(signal.SIGTERM)
            assert running.wait(60) == 0
    assert used[0][0] == 0
    assert used[1][0] > 300
    assert used[0][1] == used[1][1]


def test_one_that_takes_too_long_is_cut(folder):
    with process(folder, "--grace", "1", "--api-key", "a-key-to-be-kept") as (running, address):
        body, key = {**CHAT, "max_tokens": 4000, "stream": True}, {"x-api-key": "a-key-to-be-kept"}
        rest = []
        with (
            contextlib.suppress(httpx.RemoteProtocolError),
            httpx.stream("POST", f"{address}/v1/chat/completions", json=body, headers=key, timeout=60) as answer,
        ):
            lines = answer.iter_lines()
            next(lines)
            running.send_signal(signal.SIGTERM)
            rest += lines
        assert "data: [DONE]" not in rest
        assert running.wait(60) == 0
        assert "a-key-to-be-kept" not in running.stderr.read()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "0.0.0.0"], "lets other machines in, so an API key is needed"),
        (["--api-key", "short"], "at least 8 ASCII characters"),
        (["--max-body", "1KB"], "body_bytes must be at least 1,024, not 1,000"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
    ],
    ids=str,
)
def test_mistakes_are_found_before_a_model_is_looked_for(words, said):
    result = call("serve", "--model", "/nowhere", *words)
    assert result.exit_code == 2
    assert said in result.output + result.stderr


def test_settings_that_no_request_could_be_answered_with(folder):
    result = call("serve", "--model", folder, "--port", "0", "--budget", "32")
    assert result.exit_code == 2
    assert "budget 32 leaves no room for a single chunk" in result.output + result.stderr


def test_without_the_extra(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None if name == "uvicorn" else found(name))
    result = call("serve", "--model", "/nowhere")
    assert result.exit_code == 2
    assert "serve needs uvicorn; pip install 'offload-triforce[serve]'" in result.output + result.stderr
