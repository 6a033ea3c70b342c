"""From files and questions to a prompt."""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from offload_triforce.errors import InputError


def read_text(path: str) -> str:
    """The text of a file; ``-`` is standard input.

    Raises:
        InputError: there is none, or it is no text.
    """
    if path == "-":
        try:
            text = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise InputError(f"standard input is not UTF-8 text (byte {error.start:,} cannot be decoded)") from error
    else:
        file = Path(path).expanduser()
        if not file.exists():
            raise InputError(f"no such file: {path}")
        if not file.is_file():
            raise InputError(f"{path} is a folder; give a text file")
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 text (byte {error.start:,} cannot be decoded)") from error
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if not text.strip():
        raise InputError(f"{'standard input' if path == '-' else path} is empty; give at least one word")
    return text


def build_prompt(tokenizer: PreTrainedTokenizerBase, text: str | None, ask: str | None, chat: bool) -> list[int]:
    """Token ids of a text and a question about it, in the model's chat format if wished and there is one.

    Raises:
        InputError: neither was given, or both are blank.
    """
    parts = [part for part in (text, ask) if part and part.strip()]
    if not parts:
        raise InputError("the prompt is empty; give a text, a question, or both")
    prompt = "\n\n".join(parts)
    if chat and tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        return tokenizer(prompt, add_special_tokens=False).input_ids
    return tokenizer(prompt).input_ids
