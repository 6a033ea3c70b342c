"""A request's prompt as token ids, within its limits, and the request as the engine takes it."""

from __future__ import annotations

import math
import secrets
import threading
from collections.abc import Sequence
from typing import Any

from offload_triforce.errors import InputError
from offload_triforce.generation.chat import chat_ids
from offload_triforce.generation.checks import check_length, encode_prompt
from offload_triforce.generation.request import interpret
from offload_triforce.server.answering import Question
from offload_triforce.server.errors import ApiError, invalid
from offload_triforce.server.sampling import Sampling
from offload_triforce.server.service import Service
from offload_triforce.server.spelling import Speller

TOO_LONG = "context_length_exceeded"  # agents look for it, to shorten their history
_encoding = threading.Lock()  # a tokenizer of the tokenizers library must not be set up by two threads at once


def chat_prompt(service: Service, messages: Sequence[dict[str, Any]], variables: dict[str, Any]) -> list[int]:
    """The ids of messages, by the model's own template. ``variables``: further ones of it."""
    with _encoding:
        return chat_ids(service.tokenizer, messages, **variables)


def text_prompt(service: Service, prompt: str | list[int]) -> list[int]:
    """The ids of a text.

    Raises:
        InputError: it is none for this model.
    """
    with _encoding:
        return encode_prompt(prompt, service.engine.model, service.tokenizer).flatten().tolist()


def ask(
    service: Service,
    prompt: list[int],
    asked: Sampling,
    new_tokens: int | None,
    *,
    top_logprobs: int | None = None,
    keep: Sequence[str] = (),
    grammar: Any = None,
) -> Question:
    """What the engine is to be asked; all that is wrong with it is found here, before anybody waits.

    Args:
        service: whose engine. prompt: ids. asked: how to draw.
        new_tokens: most of the answer; None is the server's own limit, or what still fits.
        top_logprobs: see ``Question``. keep: special tokens that are spelled. grammar: a logits processor.

    Raises:
        ApiError, InputError: what is wrong.
    """
    engine = service.engine
    _check_prompt(service, len(prompt))
    new_tokens = new_tokens or _what_fits(service, len(prompt))
    try:
        check_length(engine.layout, engine.settings, len(prompt), new_tokens)
    except InputError as error:
        # Words that agents and proxies look for; not where a smaller max_tokens would do.
        alone = "the prompt is too long: " if _room(service, len(prompt)) < 1 else ""
        raise invalid(f"{alone}{error}", "messages", TOO_LONG) from None
    options = asked.options(engine.model.generation_config, len(prompt), engine.layout.vocabulary)
    if grammar is not None:
        options["logits_processor"].append(grammar)
    encoded = encode_prompt(prompt, engine.model, service.tokenizer)
    request = interpret(engine.model, encoded, None, service.tokenizer, {"max_new_tokens": new_tokens, **options})
    seed = secrets.randbits(62) if asked.seed is None else asked.seed
    ends = request.eos or frozenset(service.ends)
    return Question(request, seed, Speller(service.tokenizer, ends, asked.stops(), keep), top_logprobs)


def _check_prompt(service: Service, tokens: int) -> None:
    limit = service.options.prompt_tokens
    if tokens == 0:
        raise invalid("the prompt is empty; give at least one word")
    if limit is not None and tokens > limit:
        many = f"{tokens:,} tokens, {tokens - limit:,} more than the {limit:,} that are allowed here"
        message = f"the prompt is too long: it has {many}"
        raise ApiError(400, message, param="messages", code=TOO_LONG)


def _what_fits(service: Service, prompt: int) -> int:
    """How many new tokens an answer may have that asks for no number."""
    return int(max(1, min(service.options.new_tokens, _room(service, prompt))))


def _room(service: Service, prompt: int) -> float:
    """How many tokens may follow a prompt."""
    engine = service.engine
    limits = [limit for limit in (engine.settings.context, engine.layout.max_positions) if limit is not None]
    return min(limits, default=math.inf) - prompt
