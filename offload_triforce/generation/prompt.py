"""From files and questions to a prompt."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from offload_triforce.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_BYTES = 1 << 30  # no model reads as much; an endless device would fill the memory
_OTHER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def read_text(path: str, blank: bool = False) -> str:
    """The text of a file; ``-`` is standard input. Both give the same text for the same bytes.

    UTF-8, whatever the locale. A byte order mark is dropped and CRLF becomes LF: neither is meant to be read.
    ``blank``: there need not be any; then it is "".

    Raises:
        InputError: there is none, or it is no text.
    """
    name = "standard input" if path == "-" else path
    data = _read_standard_input() if path == "-" else _read_file(path)
    if len(data) > MOST_BYTES:
        raise InputError(f"{name} holds more than {MOST_BYTES / 1e9:.1f} GB, which no model can read")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind = _OTHER_MARKS.get(data[:2])
        hint = f"it looks like {kind}; convert it first" if kind else f"byte {error.start:,} cannot be decoded"
        raise InputError(f"{name} is not UTF-8 text ({hint})") from error
    if "\0" in text:
        raise InputError(f"{name} is not text: it holds NUL bytes")
    if not text.strip():
        if blank:
            return ""
        raise InputError(f"{name} is empty; give at least one word")
    return text.replace("\r\n", "\n")


def _read_standard_input() -> bytes:
    if sys.stdin is None:
        raise InputError("standard input is closed; give --prompt or --prompt-file")
    try:
        return sys.stdin.buffer.read(MOST_BYTES + 1)
    except OSError as error:
        raise InputError(f"standard input cannot be read: {error.strerror}") from error


def _read_file(path: str) -> bytes:
    try:
        file = Path(path).expanduser()
        mode = os.stat(file).st_mode
        if stat.S_ISDIR(mode):
            raise InputError(f"{path} is a folder; give a text file")
        with open(file, "rb") as opened:
            if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or opened.isatty()):
                raise InputError(f"{path} is a device; give a text file")
            return opened.read(MOST_BYTES + 1)
    except FileNotFoundError as error:
        raise InputError(f"no such file: {path}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except RuntimeError as error:  # a home folder of nobody
        raise InputError(f"no such file: {path} ({error})") from error


def check_text(name: str, text: str | None) -> None:
    """Refuse bytes on the command line that are no UTF-8: Python hands them on as lone surrogates.

    Raises:
        InputError: says where. ``name``: of the option.
    """
    try:
        (text or "").encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{name} is not UTF-8 text (character {error.start:,} cannot be encoded)") from error


def build_prompt(
    tokenizer: PreTrainedTokenizerBase,
    text: str | None,
    ask: str | None = None,
    system: str | None = None,
    raw: bool = False,
    chat: bool = False,
) -> list[int]:
    """Token ids of a text and a question about it, in the model's chat format if it has one.

    Args:
        text, ask: at least one of them. system: instructions that come first.
        raw: leave the chat format out: the model continues the text. chat: it has to have one.

    Raises:
        InputError: there is nothing to say, there is no chat template that has to be, or it refuses this.
    """
    from offload_triforce.generation.chat import chat_ids, has_chat_format  # transformers: not before a mistake is told

    parts = [part for part in (text, ask) if part and part.strip()]
    if not parts:
        raise InputError("the prompt is empty; give a text, a question, or both")
    prompt = "\n\n".join(parts)
    if chat and not has_chat_format(tokenizer):
        raise InputError("this model has no chat template; leave --chat out, and it continues the text")
    if raw or not has_chat_format(tokenizer):
        if system is not None:
            why = "raw leaves it out" if raw else "this model has none"
            raise InputError(f"system instructions need a chat format, but {why}; put them into the prompt")
        return tokenizer(prompt).input_ids
    messages = [] if system is None else [{"role": "system", "content": system}]
    try:
        return chat_ids(tokenizer, [*messages, {"role": "user", "content": prompt}])
    except InputError as error:
        hint = "" if system is None else "leave the system instructions out, or "
        raise InputError(f"{error}; {hint}give the text without it (--raw)") from error
