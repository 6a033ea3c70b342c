"""The demo on a tiny model: both ways give the same tokens, and what it prints."""

import io
import json

import pytest
from rich.console import Console

from offload_triforce import InputError, TriForceError
from offload_triforce.cli import demonstration as demo
from offload_triforce.config import Settings
from tests.byte_tokenizer import save_tiny_llama
from tests.cli.calling import call


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "fetch_model", lambda name: str(save_tiny_llama(tmp_path)))


def test_as_a_command(tiny):
    args = ("--prompt-tokens", 512, "--max-new-tokens", 4, "--budget", 128, "--draft-cache", 64, "--link-gbps", 10)
    shown = call("demo", *args)
    assert shown.exit_code == 0, shown.stderr
    for words in ("behind an emulated link of 10 GB/s", demo.QUESTION, "plain decoding", "Identical tokens"):
        assert words in " ".join(shown.stdout.split())
    runs = json.loads(call("demo", *args, "--json").stdout)
    assert set(runs) == {"plain", "hierarchy"}
    assert runs["plain"]["token_ids"] == runs["hierarchy"]["token_ids"]


def test_drafts_that_are_none(tiny):
    with pytest.raises(InputError, match="the demo's drafts are"):
        demo.run_demo(Console(file=io.StringIO()), Settings(), "[/x]", 512, 2, 0.0, 0)


def test_different_tokens_are_told(tiny, monkeypatch):
    """They must not happen; if they do, the demo says so and fails."""
    runs = {}
    for name, tokens in (("plain", [1, 2, 3]), ("hierarchy", [1, 2, 4])):
        stats = type("Stats", (), {"ms_per_token": 1.0})()
        runs[name] = type("Run", (), {"token_ids": tokens, "stats": stats})()
    with pytest.raises(TriForceError, match="differ from new token 2 on"):
        demo._judge(Console(file=io.StringIO()), runs)
