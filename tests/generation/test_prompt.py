"""What is read as a prompt, whatever it comes from, and the chat format around it."""

import io
import os
import sys
import threading

import pytest

from offload_triforce import InputError
from offload_triforce.generation import prompt
from offload_triforce.generation.prompt import build_prompt, check_text, read_text
from tests.byte_tokenizer import byte_tokenizer

CHAT = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def chatting(tokenizer):
    tokenizer.chat_template = CHAT
    return tokenizer


def piped(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="latin-1", newline=None))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"plain\n", "plain\n"),
        (b"\xef\xbb\xbfwith a mark", "with a mark"),
        (b"two\r\nlines\r\n", "two\nlines\n"),
        (b"\xef\xbb\xbf\r\n both", "\n both"),
        (b"a lone\rreturn stays", "a lone\rreturn stays"),
        ("naïve 文字".encode(), "naïve 文字"),
    ],
)
def test_a_file_and_standard_input_give_the_same_text(data, text, tmp_path, monkeypatch):
    path = tmp_path / "text"
    path.write_bytes(data)
    piped(monkeypatch, data)
    assert read_text(str(path)) == read_text("-") == text


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf \r\n", "is empty"),
        (b"\xff\xfea\0b\0", "looks like UTF-16"),
        (b"abc\xff", "byte 3 cannot be decoded"),
        (b"text\0text", "NUL bytes"),
    ],
)
def test_what_is_no_text(data, words, tmp_path, monkeypatch):
    path = tmp_path / "text"
    path.write_bytes(data)
    piped(monkeypatch, data)
    for source in (str(path), "-"):
        with pytest.raises(InputError, match=words):
            read_text(source)


def test_nothing_is_no_mistake_where_nothing_was_asked_for(monkeypatch):
    piped(monkeypatch, b" \n")
    assert read_text("-", blank=True) == ""


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/nowhere/at/all", "no such file"),
        ("~nobody-of-that-name/x", "no such file"),
        ("/", "is a folder"),
        ("/dev/zero", "is a device"),
        ("/proc/self/mem", "cannot be read"),
        ("a" * 5000, "cannot be read: File name too long"),
    ],
)
def test_files_that_cannot_be_read(path, words):
    with pytest.raises(InputError, match=words):
        read_text(path)


def test_a_file_that_no_model_can_read(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt, "MOST_BYTES", 10)
    path = tmp_path / "text"
    path.write_text("x" * 11)
    with pytest.raises(InputError, match="more than"):
        read_text(str(path))


def test_a_fifo_as_of_process_substitution(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=["from a process"])
    writer.start()
    assert read_text(str(path)) == "from a process"
    writer.join()


def test_closed_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="standard input is closed"):
        read_text("-")


def test_bytes_on_the_command_line_that_are_no_text():
    check_text("--prompt", "naïve")
    check_text("--prompt", None)
    with pytest.raises(InputError, match="--prompt is not UTF-8 text"):
        check_text("--prompt", "abc\udcff")


def test_the_chat_format_is_used_where_there_is_one(chatting):
    ids = build_prompt(chatting, "A text.", "A question?", system="Be brief.")
    assert chatting.decode(ids) == "<system>Be brief.<user>A text.\n\nA question?<assistant>"
    assert chatting.decode(build_prompt(chatting, "Hi")) == "<user>Hi<assistant>"
    assert chatting.decode(build_prompt(chatting, "Hi", raw=True)) == "Hi"


def test_an_empty_system_message_is_one(chatting):
    assert chatting.decode(build_prompt(chatting, "Hi", system="")) == "<system><user>Hi<assistant>"


def test_a_model_without_a_chat_format(tokenizer):
    assert tokenizer.decode(build_prompt(tokenizer, "Hi", "there")) == "Hi\n\nthere"
    with pytest.raises(InputError, match="this model has none"):
        build_prompt(tokenizer, "Hi", system="Be brief.")


def test_system_instructions_need_the_chat_format(chatting):
    with pytest.raises(InputError, match="raw leaves it out"):
        build_prompt(chatting, "Hi", system="Be brief.", raw=True)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported; leave the system"),
        ("{% if ", "the model's chat template refuses"),
        ("{{ messages[7]['content']['x'] }}", "the model's chat template refuses"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages.__class__.__mro__ }}", "the model's chat template refuses"),
        ("{{ nothing() }}", "the model's chat template refuses"),
        ("{% include 'file' %}", "the model's chat template refuses"),
    ],
)
def test_templates_that_fail_are_one_sentence(template, words, tokenizer):
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=words) as error:
        build_prompt(tokenizer, "Hi", system="Be brief.")
    assert "\n" not in str(error.value)
    assert "--raw" in str(error.value)


def test_an_empty_prompt(tokenizer):
    with pytest.raises(InputError, match="the prompt is empty"):
        build_prompt(tokenizer, " ", None)
