"""A long real text that every machine has: the source of Python's standard library."""

from __future__ import annotations

import argparse
import inspect
import optparse
import textwrap

from offload_triforce.engine import TriForce
from offload_triforce.generation.prompt import build_prompt

QUESTION = "Explain what this code does, function by function."


def demo_prompt(engine: TriForce, tokens: int) -> list[int]:
    """About that many tokens of standard-library source, and a question about it."""
    source = "\n\n".join(inspect.getsource(module) for module in (textwrap, argparse, optparse))
    ids = engine.tokenizer(source, add_special_tokens=False).input_ids[: tokens - 64]
    return build_prompt(engine.tokenizer, engine.tokenizer.decode(ids), QUESTION)
