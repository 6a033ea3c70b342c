"""The command ``generate``: streams, reports, JSON, the chat format, files; and Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from offload_triforce import MemoryLimitError
from offload_triforce.runtime import decoding
from tests.byte_tokenizer import byte_tokenizer, save_tiny_llama
from tests.cli.calling import FEW, SMALL, check_mistake, generate, refused

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


def test_json_is_one_object_with_the_documented_keys(model, book):
    result = generate(
        "--model",
        model,
        "--prompt-file",
        book,
        "--ask",
        "Who?",
        "--max-new-tokens",
        "40",
        *SMALL,
        "--link-gbps",
        "1000",
        "--json",
    )
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert set(report) >= KEYS
    assert len(report["token_ids"]) == report["new_tokens"] <= 40
    assert len(report["prompt_ids"]) == report["prompt_tokens"] > 600
    assert report["tokens_per_pass"] == report["new_tokens"] / report["passes"]
    assert set(report["acceptance"]) == {"draft", "retrieval"}
    assert report["link_bytes_per_token"] == report["link_bytes"] / report["new_tokens"] > 0


def test_text_streams_to_stdout_and_the_report_to_stderr(model, book):
    plain = generate(
        "--model",
        model,
        "--prompt-file",
        book,
        "--gamma",
        "0",
        "--max-new-tokens",
        "40",
        *SMALL,
        "--link-gbps",
        "1000",
        "--json",
    )
    result = generate("--model", model, "--prompt-file", book, "--max-new-tokens", "40", *SMALL)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == json.loads(plain.stdout)["text"] + "\n"
    opening, closing = result.stderr.splitlines()
    assert opening.startswith("CPU, float32; KV cache for 676 tokens (360.4 KB) in host memory")
    assert closing.endswith(" ms/token")
    assert "40 tokens" in closing
    assert "link" not in result.stderr  # there is none


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
    first, second = (generate(*args, *SMALL, "--link-gbps", "0.1", "--resident", "0.5", "--json") for _ in range(2))
    assert first.exit_code == 0, first.stderr
    assert json.loads(first.stdout)["token_ids"] == json.loads(second.stdout)["token_ids"]


def test_settings_file_and_options_that_win_over_it(model, book, tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"budget": 96, "tile": 64, "draft_cache": 64, "gamma": 0}))
    args = ["--model", model, "--prompt-file", book, "--max-new-tokens", "10", "--config", str(path), "--json"]
    assert json.loads(generate(*args).stdout)["tokens_per_pass"] == 1
    assert (
        json.loads(generate(*args, "--gamma", "6", "--draft", "none", "--draft-cost", "0.1").stdout)["proposed"][
            "retrieval"
        ]
        > 0
    )


def test_stop_string_and_standard_input(model, book):
    whole = generate("--model", model, "--prompt-file", book, "--max-new-tokens", "40", *SMALL)
    stop = whole.stdout[10:12]
    args = ["--model", model, "--prompt-file", "-", "--max-new-tokens", "40", "--stop", stop, *SMALL]
    with open(book) as text:
        result = generate(*args, input=text.read())
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
    args = [a.format(model=model, typo=typo, book=book) if a.startswith("{") else a for a in args]
    refused("generate", *args, words=expected)


def test_unsupported_model_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}')
    refused("generate", "--model", tmp_path, "--prompt", "x", words="encoder-decoder")


def test_too_little_host_memory_is_refused_with_numbers(tmp_path):
    folder = save_tiny_llama(tmp_path, max_position_embeddings=10**10)
    result = generate("--model", folder, "--prompt", "x", "--context", 10**10)
    check_mistake(result, "GB too little")
    assert "would fit" in result.stderr


# The command, saying when the prefill begins. A shell makes what it runs in the background deaf to Ctrl-C.
READING = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from offload_triforce import cli
from offload_triforce.runtime.group_reading import Prefill
run = Prefill.run
Prefill.run = lambda *args: (print("reading", flush=True), run(*args))
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
        assert " tokens, " in err.decode().splitlines()[-2]


def test_the_whole_report(model, book):
    """Under -v; and of the link where there is one."""
    result = generate("--model", model, "--prompt-file", book, *FEW, "-v", "--link-gbps", "1", "--resident", "0.5")
    assert result.exit_code == 0, result.stderr
    assert "behind an emulated link of 1 GB/s, 50% of it resident" in result.stderr.splitlines()[0]
    for words in ("tokens per pass", "first token after", "accepted draft tokens", "MB/token"):
        assert words in result.stderr
    silent = generate("--model", model, "--prompt-file", book, *FEW, "--verbose")
    assert "tokens per pass" in silent.stderr
    assert "link" not in silent.stderr


def test_why_it_stopped(model):
    args = ("--model", model, "--prompt", "Once", *FEW)
    assert generate(*args).stderr.splitlines()[-1].startswith("length (the limit of new tokens): 4 tokens")
    report = json.loads(generate(*args, "--json").stdout)
    assert report["finish_reason"] == "length"
    first = next(letter for letter in report["text"] if letter.isascii())
    assert generate(*args, "--stop", first).stderr.splitlines()[-1].startswith("stop_string (one of --stop): 3 tokens")
    assert json.loads(generate(*args, "--stop", first, "--json").stdout)["finish_reason"] == "stop_string"


def prompt_of(*args, input=None):
    """The text that the model gets."""
    result = generate(*args, *FEW, "--json", input=input)
    assert result.exit_code == 0, result.stderr
    return byte_tokenizer().decode(json.loads(result.stdout)["prompt_ids"])


def test_the_chat_format_is_used_unless_raw(model, chatting):
    assert prompt_of("--model", chatting, "--prompt", "Hi") == "<user>Hi<assistant>"
    assert prompt_of("--model", chatting, "--prompt", "A.", "--ask", "B?") == "<user>A.\n\nB?<assistant>"
    assert prompt_of("--model", chatting, "--prompt", "Hi", "--system", "S") == "<system>S<user>Hi<assistant>"
    assert prompt_of("--model", chatting, "--prompt", "Hi", "--raw") == "Hi"
    assert prompt_of("--model", model, "--prompt", "Hi") == "Hi"


def test_system_instructions_that_cannot_be(model, chatting):
    refused("generate", "--model", model, "--prompt", "Hi", "--system", "S", words="this model has none")
    refused("generate", "--model", chatting, "--prompt", "x", "--system", "S", "--raw", words="exclude each other")
    refused(
        "generate",
        "--model",
        chatting,
        "--prompt",
        "x",
        "--system",
        "no",
        words="the model's chat template refuses these messages",
    )


def test_what_is_piped_in_needs_no_option(model, tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbfA text.\r\n")
    piped = path.read_bytes()
    assert prompt_of("--model", model, input=piped) == "A text.\n"
    assert prompt_of("--model", model, "--prompt-file", "-", input=piped) == "A text.\n"
    assert prompt_of("--model", model, "--prompt-file", path) == "A text.\n"
    assert prompt_of("--model", model, "--ask", "B?", input=piped) == "A text.\n\n\nB?"
    assert prompt_of("--model", model, "--ask", "B?", input=b"") == "B?"
    assert prompt_of("--model", model, "--prompt", "C", input=piped) == "C"


def test_what_is_piped_in_and_no_text(model):
    refused("generate", "--model", model, input=b"", words="pipe a text in")
    refused("generate", "--model", model, "--prompt-file", "-", input=b"", words="standard input is empty")
    refused("generate", "--model", model, input=b"\xff\xfe", words="standard input is not UTF-8 text")
    refused("generate", "--model", model, "--ask", "x", input=b"a\0", words="NUL bytes")


def test_who_leaves_standard_input_open_is_told(model, monkeypatch):
    monkeypatch.setattr("offload_triforce.cli.generate.PATIENCE", 0.05)
    read, write = os.pipe()
    slow = threading.Timer(1.0, os.close, [write])
    slow.start()
    monkeypatch.setattr("offload_triforce.generation.prompt._read_standard_input", lambda: os.read(read, 100))
    result = generate("--model", model)
    slow.join()
    assert result.stderr.splitlines()[0] == "reading the prompt from standard input, up to its end"
    assert result.exit_code == 2


def test_an_empty_stop_string(model):
    refused("generate", "--model", model, "--prompt", "x", "--stop", "a", "--stop", "", words="--stop is empty")


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_an_answer_in_a_file(form, model, book, tmp_path):
    args = ("--model", model, "--prompt-file", book, *FEW, *form)
    path = tmp_path / "answer"
    path.write_text("something longer that was there before" * 100)
    result = generate(*args, "--output", path)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    shown = generate(*args, "--output", "-").stdout
    if form:
        assert json.loads(path.read_text())["text"] == json.loads(shown)["text"]
    else:
        assert path.read_text(encoding="utf-8") == shown


def test_an_answer_that_cannot_be_kept_is_shown(model, book):
    args = ("--model", model, "--prompt-file", book, *FEW)
    result = generate(*args, "--output", "/dev/full")
    assert result.exit_code == 2
    assert result.stdout == generate(*args).stdout
    assert result.stderr.splitlines()[-1] == (
        "error: /dev/full could not be written: No space left on device; the answer is on standard output instead"
    )


def test_files_for_answers_are_refused_before_the_work(model, book, tmp_path, monkeypatch):
    monkeypatch.setattr("offload_triforce.engine.TriForce.load", lambda *_: pytest.fail("loaded"))
    path = tmp_path / "book.txt"
    path.write_text("A text.")
    (tmp_path / "link").symlink_to(path)
    for output, words in (
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "file", "does not exist"),
        ("/proc/new", "cannot be written"),
        (tmp_path / "link", "would overwrite the prompt"),
        ("x" * 5000, "cannot be written: File name too long"),
    ):
        refused("generate", "--model", model, "--prompt-file", path, "--output", output, words=words)
    assert path.read_text() == "A text."


def test_what_there_is_of_an_answer_is_kept(model, book, tmp_path, monkeypatch):
    """Memory that runs out, or Ctrl-C: the file holds the tokens until then."""
    whole = generate("--model", model, "--prompt-file", book, "--max-new-tokens", "20", *SMALL).stdout
    real = decoding._next

    def fails_after(tokens, error):
        seen = []

        def step(*args):
            if len(seen) >= tokens:
                raise error
            found = real(*args)
            seen.extend(found or ())
            return found

        return step

    for error, code in ((MemoryLimitError("memory ran out"), 2), (KeyboardInterrupt(), 130)):
        path = tmp_path / f"answer{code}"
        monkeypatch.setattr(decoding, "_next", fails_after(5, error))
        args = ("--model", model, "--prompt-file", book, "--max-new-tokens", "20", *SMALL, "--output", path)
        result = generate(*args)
        assert result.exit_code == code
        assert result.stdout == ""
        assert len(path.read_text()) > 3
        assert whole.startswith(path.read_text().rstrip("\n"))
        nothing = tmp_path / "nothing"
        monkeypatch.setattr(decoding, "_next", fails_after(0, error))
        assert generate(*args[:-1], nothing).exit_code == code
        assert not nothing.exists()
