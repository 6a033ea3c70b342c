"""What people ask of a long text. The texts are what every machine with Python has: its own library and manual."""

from __future__ import annotations

import argparse
import ast
import asyncio.base_events
import collections
import email.message
import http.client
import inspect
import optparse
import pydoc_data.topics
import tarfile
import textwrap
import typing
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from transformers import PreTrainedTokenizerBase

from offload_triforce.errors import InputError

# Enough for 130K tokens. The first one alone gives SmolLM2 its 6,000.
CODE: tuple[ModuleType, ...] = (
    textwrap, argparse, optparse, collections, http.client, email.message, zipfile, ast, asyncio.base_events, typing,
    tarfile, inspect,
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A question about a long text.

    Attributes:
        name: short. text: "code" or "manual".
        ask: put after the text in the model's chat format; None lets the text itself go on.
        start: how the answer begins, so that a small model does what it is asked to.
    """

    name: str
    text: str
    ask: str | None
    start: str = ""


TASKS = (
    Task("explain", "code", "Explain what this code does, function by function."),
    Task("continue", "code", None),
    Task(
        "edit",
        "code",
        "Repeat the function `fill` of TextWrapper and the function `dedent` from this code, unchanged but for one "
        "thing: rename the variable `text` to `source` everywhere.",
        'Here is the code with the variable renamed:\n\n```python\ndef fill(source, width=70, **kwargs):\n    """',
    ),
    Task("question", "manual", "What does this manual say about assignment statements? Quote the rules that matter."),
    Task("chat", "manual", "Thank you. Now tell me a story about a dragon who learns to write programs."),
)


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        InputError: there is none.
    """
    found = [one for one in TASKS if one.name == name]
    if not found:
        raise InputError(f"unknown task {name!r}; known are {', '.join(one.name for one in TASKS)}")
    return found[0]


def long_text(kind: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> str:
    """About that many tokens of Python's library ("code") or of its manual.

    Raises:
        InputError: there is not that much of it.
    """
    if kind == "code":
        whole = "\n\n".join(inspect.getsource(module) for module in CODE)
    else:
        topics = pydoc_data.topics.topics
        whole = "\n\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer(whole, add_special_tokens=False).input_ids
    if len(ids) < tokens:
        raise InputError(f"there are {len(ids):,} tokens of Python's {kind}, not {tokens:,}; ask for fewer")
    return tokenizer.decode(ids[:tokens])


def prompts(tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], tokens: int) -> dict[Task, list[int]]:
    """Token ids of each task's prompt, of about that many tokens.

    Prompts on one text begin alike, so that it need be read only once: also where no question follows.
    """
    texts = {kind: long_text(kind, tokenizer, tokens) for kind in dict.fromkeys(task.text for task in tasks)}
    return {task: _prompt(tokenizer, texts[task.text], task) for task in tasks}


def _prompt(tokenizer: PreTrainedTokenizerBase, text: str, task: Task) -> list[int]:
    def chat(content: str) -> str:
        message = [{"role": "user", "content": content}]
        return tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)

    if task.ask is None:
        mark = "\u2603"
        return tokenizer(chat(mark).partition(mark)[0] + text, add_special_tokens=False).input_ids
    return tokenizer(chat(f"{text}\n\n{task.ask}") + task.start, add_special_tokens=False).input_ids


def common_start(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all of them begin with."""
    shortest = min(map(len, sequences))
    return next((i for i in range(shortest) if len({ids[i] for ids in sequences}) > 1), shortest)


def loops(tokens: Sequence[int], least: int = 24) -> bool:
    """Whether a text has fallen into a loop: it ends with, or holds, a stretch that follows itself three times.

    Stretches of up to a third of the text count, if all three together have at least ``least`` tokens.
    """
    for period in range(1, len(tokens) // 3 + 1):
        run = 0
        for one, other in zip(tokens, tokens[period:], strict=False):
            run = run + 1 if one == other else 0
            if run >= max(2 * period, least - period):
                return True
    return False
