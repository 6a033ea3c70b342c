"""What is refused before any work starts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offload_triforce.config import Settings
from offload_triforce.errors import InputError
from offload_triforce.generation.chat import Message, chat_ids, is_chat
from offload_triforce.model.layout import ModelLayout

Prompt = str | Sequence[int] | Sequence[Message] | Tensor


def encode_prompt(prompt: Prompt, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """A text, messages of a chat, token ids, or a tensor (n,) or (1, n) of them, as ids on the CPU.

    Raises:
        InputError: why it is no prompt for this model.
    """
    if is_chat(prompt):
        prompt = chat_ids(tokenizer, prompt)
    elif isinstance(prompt, str):
        if tokenizer is None:
            raise InputError("a text prompt needs a tokenizer; pass token ids, or load one with the model")
        if not prompt.strip():
            raise InputError("the prompt is empty; give at least one word")
        prompt = tokenizer(prompt, return_tensors="pt").input_ids
    try:
        ids = torch.as_tensor(prompt, dtype=torch.long, device="cpu")
    except (ValueError, TypeError) as error:
        raise InputError(f"the prompt is neither text nor one list of token ids ({error})") from error
    vocabulary = model.get_input_embeddings().num_embeddings
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise InputError(f"the prompt holds token ids outside of the vocabulary of {vocabulary}")
    return ids


def check_context(context: int, positions: int | None) -> None:
    """A context setting has to fit the model.

    Raises:
        InputError: by how much it does not.
    """
    if positions is not None and context > positions:
        raise InputError(
            f"context {context:,} exceeds the model's {positions:,} positions by {context - positions:,}; set it to "
            f"{positions:,} or less"
        )


def check_length(layout: ModelLayout, settings: Settings, prompt: int, new: int) -> None:
    """Prompt and answer have to fit.

    Raises:
        InputError: by how much they do not, and what would.
    """
    total = prompt + new
    limits = ((settings.context, "the context setting"), (layout.max_positions, "the model's positions"))
    for limit, what in limits:
        if limit is not None and total > limit:
            fits = limit - prompt
            hint = f"at most {fits:,} new tokens fit" if fits > 0 else f"shorten the prompt by {1 - fits:,} tokens"
            raise InputError(
                f"{prompt:,} prompt tokens and {new:,} new ones exceed {what}, {limit:,}, by {total - limit:,}; {hint}"
            )
    switch = layout.longrope_switch
    if switch is not None and prompt <= switch < total:
        raise InputError(
            f"longrope changes its frequencies at {switch:,} tokens, between the prompt's {prompt:,} and the end at "
            f"{total:,}, where cached keys would go stale; ask for at most {switch - prompt:,} new tokens, or start "
            f"with more than {switch:,}"
        )
