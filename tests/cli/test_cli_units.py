"""Every option that takes a size, a number of tokens or a speed reads it by the one parser."""

import json

import pytest

from tests.byte_tokenizer import save_tiny_llama
from tests.cli.calling import call
from tests.cli.test_cli_help import LEAVES

TOKENS = {
    "context",
    "budget",
    "tile",
    "draft_cache",
    "tokens",
    "prompt_tokens",
    "max_new_tokens",
    "new_tokens",
    "measure",
}
BYTES, SPEEDS = {"vram", "ram"}, {"link", "hbm", "link_gbps"}
NEEDED = {
    "chat": ["--model", "./x"],
    "serve": ["--model", "./x"],
    "generate": ["--model", "./x", "--prompt", "hi"],
    "plan": ["--model", "qwen3-8b", "--gpu", "4090"],
}


OPTIONS = [
    (words, parameter.name)
    for words, command in LEAVES.items()
    for parameter in command.params
    if parameter.name in TOKENS | BYTES | SPEEDS
]


def test_all_commands_are_looked_at():
    assert {" ".join(words) for words, _ in OPTIONS} >= {"generate", "plan", "demo", "trace", "bench throughput"}
    assert len(OPTIONS) > 30


@pytest.mark.parametrize(("words", "name"), OPTIONS, ids=[" ".join((*words, name)) for words, name in OPTIONS])
def test_what_cannot_be_read_is_one_sentence_that_names_the_option(words, name):
    """And comes before the work: no model is there to be read."""
    option = f"--{name.replace('_', '-')}"
    result = call(*words, *NEEDED.get(words[0], []), option, "lots")
    assert result.exit_code == 2, result.stdout
    kind = "is not a number of tokens" if name in TOKENS else "is not a size" if name in BYTES else "is not a bandwidth"
    assert kind in result.stderr
    assert name in result.stderr.replace("-", "_")
    assert result.stderr.count("\n") == 1


def test_generate_reads_them_as_plan_does(tmp_path):
    folder = str(save_tiny_llama(tmp_path / "m", eos_token_id=None))
    text = "To be, or not to be, that is the question. " * 5
    answers = []
    for given in (
        ["--context", "1024", "--budget", "1,024", "--tile", "64", "--link-gbps", "3.125", "--max-new-tokens", "8"],
        ["--context", "1K", "--budget", "1k", "--tile", "64", "--link-gbps", "25Gb/s", "--max-new-tokens", " 8 "],
    ):
        result = call("generate", "--model", folder, "--prompt", text, "--device", "cpu", "--json", *given)
        assert result.exit_code == 0, result.stderr
        answers.append(json.loads(result.stdout))
    assert answers[0]["text"] == answers[1]["text"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["demo", "--prompt-tokens", "100"], "--prompt-tokens must be between 512 and 8,000 tokens, not 100"),
        (["demo", "--prompt-tokens", "8K"], "--prompt-tokens must be between 512 and 8,000 tokens, not 8,192"),
        (["bench", "pipeline", "--tokens", "256"], "--tokens must be at least 512 tokens, not 256"),
        (
            ["generate", "--model", "./x", "--prompt", "hi", "--max-new-tokens", "0"],
            "--max-new-tokens must be at least 1",
        ),
        (["trace", "--link-gbps", "25gbps"], "may mean bytes or bits"),
        (["bench", "throughput", "--context", "2K", "--context", "lots"], "--context 'lots' is not a number of tokens"),
    ],
)
def test_reaches(args, words):
    result = call(*args)
    assert result.exit_code == 2, result.stdout
    assert words in result.stderr
