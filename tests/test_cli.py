"""The command line: streams, reports, JSON, and one sentence for each mistake."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from offload_triforce import cli
from tests.byte_tokenizer import save_tiny_llama

KEYS = {
    "text",
    "token_ids",
    "prompt_ids",
    "prompt_tokens",
    "new_tokens",
    "passes",
    "tokens_per_pass",
    "acceptance",
    "link_bytes",
    "link_bytes_per_token",
    "full_kv_bytes",
    "ttft_s",
    "ms_per_token",
}
SMALL = ["--budget", "128", "--tile", "64", "--draft-cache", "64"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_llama(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("It was the best of times, it was the worst of times. " * 12, encoding="utf-8")
    return str(path)


def call(*args):
    return CliRunner().invoke(cli.app, ["generate", *args])


def test_json_is_one_object_with_the_documented_keys(model, book):
    result = call("--model", model, "--prompt-file", book, "--ask", "Who?", "--max-new-tokens", "40", *SMALL, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert set(report) >= KEYS
    assert len(report["token_ids"]) == report["new_tokens"] <= 40
    assert len(report["prompt_ids"]) == report["prompt_tokens"] > 600
    assert report["tokens_per_pass"] == report["new_tokens"] / report["passes"]
    assert set(report["acceptance"]) == {"draft", "retrieval"}
    assert report["link_bytes_per_token"] == report["link_bytes"] / report["new_tokens"] > 0


def test_text_streams_to_stdout_and_the_report_to_stderr(model, book):
    plain = call("--model", model, "--prompt-file", book, "--gamma", "0", "--max-new-tokens", "40", *SMALL, "--json")
    result = call("--model", model, "--prompt-file", book, "--max-new-tokens", "40", *SMALL)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == json.loads(plain.stdout)["text"] + "\n"
    assert "tokens per pass" in result.stderr
    assert "MB/token" in result.stderr


@pytest.mark.parametrize("draft", ["none", "self", "ngram"])
def test_drafts_sampling_and_emulated_link(model, book, draft):
    options = [
        "--temperature",
        "0.7",
        "--top-p",
        "0.9",
        "--top-k",
        "50",
        "--min-p",
        "0.01",
        "--repetition-penalty",
        "1.1",
    ]
    args = [
        "--model",
        model,
        "--draft",
        draft,
        "--prompt-file",
        book,
        "--max-new-tokens",
        "20",
        "--seed",
        "3",
        *options,
    ]
    first, second = (call(*args, *SMALL, "--link-gbps", "0.1", "--resident", "0.5", "--json") for _ in range(2))
    assert first.exit_code == 0, first.stderr
    assert json.loads(first.stdout)["token_ids"] == json.loads(second.stdout)["token_ids"]


def test_settings_file_and_options_that_win_over_it(model, book, tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"budget": 96, "tile": 64, "draft_cache": 64, "gamma": 0}))
    args = ["--model", model, "--prompt-file", book, "--max-new-tokens", "10", "--config", str(path), "--json"]
    assert json.loads(call(*args).stdout)["tokens_per_pass"] == 1
    assert json.loads(call(*args, "--gamma", "6", "--draft", "none").stdout)["proposed"]["retrieval"] > 0


def test_stop_string_and_standard_input(model, book):
    whole = call("--model", model, "--prompt-file", book, "--max-new-tokens", "40", *SMALL)
    stop = whole.stdout[10:12]
    args = ["generate", "--model", model, "--prompt-file", "-", "--max-new-tokens", "40", "--stop", stop, *SMALL]
    with open(book) as text:
        result = CliRunner().invoke(cli.app, args, input=text.read())
    assert result.exit_code == 0, result.stderr
    assert result.stdout == whole.stdout[: whole.stdout.index(stop) + len(stop)] + "\n"


MISTAKES = {
    "no such model": (["--model", "./nowhere", "--prompt", "x"], "no such file or folder: ./nowhere"),
    "no such prompt file": (["--model", "{model}", "--prompt-file", "gone.txt"], "no such file: gone.txt"),
    "folder as prompt file": (["--model", "{model}", "--prompt-file", "/"], "is a folder"),
    "binary prompt file": (["--model", "{model}", "--prompt-file", sys.executable], "is not UTF-8 text"),
    "empty prompt": (["--model", "{model}", "--prompt", "  "], "the prompt is empty"),
    "empty file": (["--model", "{model}", "--prompt-file", "/dev/null"], "give a text file"),
    "two prompts": (["--model", "{model}", "--prompt", "x", "--prompt-file", "y"], "exclude each other"),
    "beyond the positions": (
        ["--model", "{model}", "--prompt", "word " * 1000, "--max-new-tokens", "9"],
        "exceed the model's positions, 4,096, by",
    ),
    "context setting too long": (
        ["--model", "{model}", "--prompt", "x", "--context", "5000"],
        "context 5,000 exceeds the model's 4,096 positions by 904",
    ),
    "budget over context": (
        ["--model", "{model}", "--prompt", "x", "--context", "1000", "--budget", "1500"],
        "budget 1500 is larger than the context of 1000 tokens by 500",
    ),
    "budget too small": (
        ["--model", "{model}", "--prompt", "word " * 100, "--budget", "20"],
        "need at least 80 tokens",
    ),
    "unknown setting": (["--model", "{model}", "--prompt", "x", "--config", "{typo}"], "did you mean 'budget'?"),
    "settings that are no JSON": (["--model", "{model}", "--prompt", "x", "--config", "{book}"], "is not JSON"),
    "unknown dtype": (["--model", "{model}", "--prompt", "x", "--dtype", "fp4"], "unknown dtype 'fp4'"),
    "unknown device": (["--model", "{model}", "--prompt", "x", "--device", "gpu"], "unknown device 'gpu'"),
    "unknown draft": (["--model", "{model}", "--draft", "./nope", "--prompt", "x"], "no such file or folder: ./nope"),
    "unknown quantisation": (["--model", "{model}", "--prompt", "x", "--quantize", "int3"], "unknown quantisation"),
    "no link": (["--model", "{model}", "--prompt", "x", "--link-gbps", "-1"], "greater than 0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_2(mistake, model, book, tmp_path):
    args, expected = MISTAKES[mistake]
    typo = tmp_path / "typo.json"
    typo.write_text('{"budgets": 3}')
    result = call(*[a.format(model=model, typo=typo, book=book) if a.startswith("{") else a for a in args])
    assert result.exit_code == 2, result.output
    assert expected in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_unsupported_model_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}')
    result = call("--model", str(tmp_path), "--prompt", "x")
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")


def test_too_little_host_memory_is_refused_with_numbers(tmp_path):
    folder = save_tiny_llama(tmp_path, max_position_embeddings=10**10)
    result = call("--model", str(folder), "--prompt", "x", "--context", str(10**10))
    assert result.exit_code == 2, result.output
    assert "GB too little" in result.stderr
    assert "would fit" in result.stderr


# The command, saying when the prefill begins. A shell makes what it runs in the background deaf to Ctrl-C.
READING = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from offload_triforce import cli, runtime
prefill = runtime.prefill
runtime.prefill = lambda *args: (print("reading", flush=True), prefill(*args))
cli.main()
"""


@pytest.mark.parametrize("phase", ["prefill", "decoding"])
def test_ctrl_c_is_one_sentence_and_130(phase, model, book):
    """A real signal to a real process. What had been generated is not lost."""
    # A slow link makes one pass last for seconds; many small prefill steps do so for the prefill.
    slow = ["--link-gbps", "0.0003"] if phase == "decoding" else ["--link-gbps", "0.00001"]
    args = [
        "--model",
        model,
        "--prompt-file",
        book,
        "--draft",
        "none",
        "--gamma",
        "0",
        "--max-new-tokens",
        "500",
        *SMALL,
    ]
    command = [sys.executable, "-c", READING, "generate", *args, *SMALL, *slow]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    assert process.stdout.readline() == b"reading\n", process.stderr.read().decode()
    if phase == "decoding":
        assert process.stdout.read(1)
    else:
        time.sleep(1)  # well into the first layer, whose tiles take minutes over this link
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 130, err.decode()
    assert err.decode().splitlines()[-1] == "interrupted"
    assert "Traceback" not in err.decode()
    if phase == "decoding":
        assert "tokens per pass" in err.decode()


def test_version_and_help():
    assert CliRunner().invoke(cli.app, ["--version"]).stdout.strip() == "0.1.0"
    assert "generate" in CliRunner().invoke(cli.app, ["--help"]).stdout
