"""What is asked for, in transformers' own terms: processors, stopping criteria, lengths.

``model.generate`` accepts a callable in place of a decoding method. Ours hands back what it was given,
so that transformers itself interprets every argument, merges the model's defaults and validates.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import (
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from offload_triforce.errors import InputError

DEFAULT_NEW_TOKENS = 256

# What generate() itself adds to the model's inputs for a plain text.
_CACHES = ("past_key_values", "cache")  # transformers 5.24 gave it another name
_KNOWN_INPUTS = {"attention_mask", "position_ids", *_CACHES, "use_cache", "logits_to_keep", "cache_position"}


@dataclass(frozen=True)
class Request:
    """One text to be continued.

    Attributes:
        prompt: token ids (n,), on the CPU.
        processors: applied to the scores of every level. do_sample: draw, or take the best.
        criteria: looked at after every token. eos: ids that end a text.
        max_new_tokens: limit of the answer.
    """

    prompt: Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    do_sample: bool
    eos: frozenset[int]
    max_new_tokens: int

    def cut(self, ids: Tensor, start: int) -> int | None:
        """Length after the first token, of those from ``start`` on, that a criterion stops at. ``ids``: (n,)."""
        for length in range(start + 1, len(ids) + 1):
            if bool(self.criteria(ids[None, :length], None).all()):
                return length
        return None


def interpret(
    model: PreTrainedModel,
    prompt: Tensor,
    generation_config: GenerationConfig | None,
    tokenizer: PreTrainedTokenizerBase | None,
    options: dict[str, Any],
) -> Request:
    """Let transformers interpret a request.

    Args:
        model: the target. prompt: (n,) or (1, n) token ids.
        generation_config: as for ``model.generate``, or None.
        tokenizer: for stop strings.
        options: further keywords of ``model.generate``. ``temperature`` alone switches sampling on (or off at 0),
            and then ``top_k`` is off unless it is given.

    Raises:
        InputError: what cannot be decoded exactly here, and what transformers rejects.
    """
    prompt = prompt[None] if prompt.dim() == 1 else prompt
    if prompt.dim() != 2:
        raise InputError(f"the prompt must be one list of token ids (1D or 2D), not {prompt.dim()}D")
    if prompt.shape[0] != 1:
        raise InputError(f"one text at a time: got a batch of {prompt.shape[0]}; call generate once for each")
    if prompt.shape[1] == 0:
        raise InputError("the prompt is empty; give at least one token")
    options = _plain_options(model, generation_config, dict(options))
    for name in ("num_beams", "num_return_sequences"):  # generate() would multiply the prompt before it asks us
        value = options.get(name) or getattr(generation_config, name, None) or 1
        if value != 1:
            raise InputError(f"{name}={value} is not supported; only 1 is")
    if options.get("assistant_model") is not None:
        raise InputError("assistant_model is not supported: give the draft when the engine is made")
    generation_config = _take_stop_strings(model, generation_config, options, tokenizer)
    options.setdefault("attention_mask", torch.ones_like(prompt))  # else generate guesses padding from token ids
    defaults, model.generation_config = model.generation_config, copy.deepcopy(model.generation_config)
    model.generation_config.stop_strings = None  # they are among the criteria by now
    try:
        return model.generate(
            prompt.to(model.device), generation_config=generation_config, custom_generate=capture, **options
        )
    except (ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(" ".join(str(error).split())) from error
    finally:
        model.generation_config = defaults


def capture(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> Request:
    """A ``custom_generate`` callable that decodes nothing and returns the request.

    Raises:
        InputError: names the option that this runtime does not decode with.
    """
    _refuse(model.generation_config, generation_config, input_ids, model_kwargs, logits_processor)
    eos = generation_config.eos_token_id
    return Request(
        prompt=input_ids[0].cpu(),
        processors=logits_processor,
        criteria=stopping_criteria,
        do_sample=bool(generation_config.do_sample),
        eos=frozenset([eos] if isinstance(eos, int) else eos or []),
        max_new_tokens=generation_config.max_length - input_ids.shape[1],
    )


def _plain_options(
    model: PreTrainedModel, generation_config: GenerationConfig | None, options: dict[str, Any]
) -> dict[str, Any]:
    """Fill in what people mean by a temperature alone, and a length where none was given."""
    temperature = options.get("temperature")
    if temperature is not None and options.get("do_sample") is None:
        if not isinstance(temperature, (int, float)) or temperature < 0:
            raise InputError(f"temperature must be a number that is not negative, got {temperature!r}")
        options["do_sample"] = temperature > 0
        if temperature > 0 and generation_config is None:
            options.setdefault("top_k", 0)
    if options.get("do_sample") is False or temperature == 0:
        for name in ("temperature", "top_k", "top_p", "min_p"):
            options.pop(name, None)
    lengths = ("max_new_tokens", "max_length")
    given = [source for source in (generation_config, model.generation_config) if source is not None]
    if options.get("max_new_tokens") is not None and options["max_new_tokens"] < 1:
        raise InputError(f"max_new_tokens must be at least 1, not {options['max_new_tokens']}")
    if not any(options.get(n) for n in lengths) and not any(getattr(s, n, None) for s in given for n in lengths):
        options["max_new_tokens"] = DEFAULT_NEW_TOKENS
    return options


def _take_stop_strings(
    model: PreTrainedModel,
    config: GenerationConfig | None,
    options: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
) -> GenerationConfig | None:
    """Turn stop strings into a criterion: ``generate`` forgets the tokenizer it would need when given a callable."""
    strings = options.pop("stop_strings", None)
    for source in (config, model.generation_config):
        strings = strings or getattr(source, "stop_strings", None)
    if not strings:
        return config
    if tokenizer is None:
        raise InputError("stop strings need a tokenizer; load one with the model")
    if config is not None:
        config = copy.deepcopy(config)
        config.stop_strings = None
    given = options.get("stopping_criteria") or []
    options["stopping_criteria"] = StoppingCriteriaList([*given, StopStringCriteria(tokenizer, strings)])
    return config


def _refuse(
    defaults: GenerationConfig,
    config: GenerationConfig,
    input_ids: Tensor,
    model_kwargs: dict[str, Any],
    processors: LogitsProcessorList,
) -> None:
    if input_ids.shape[0] != 1:
        raise InputError(f"one text at a time: got a batch of {input_ids.shape[0]}; call generate once for each")
    for name in ("num_beams", "num_return_sequences"):
        if (getattr(config, name, None) or 1) != 1:
            raise InputError(f"{name}={getattr(config, name)} is not supported; only 1 is")
    for name in ("cache_implementation", "prompt_lookup_num_tokens", "penalty_alpha", "dola_layers"):
        value = getattr(config, name, None)
        if value and value != getattr(defaults, name, None):
            raise InputError(f"{name} is not supported: this runtime brings its own caches and its own speculation")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name, None):
            raise InputError(f"{name} is not supported; leave it out")
    if any(isinstance(p, UnbatchedClassifierFreeGuidanceLogitsProcessor) for p in processors):
        raise InputError("guidance_scale is not supported: it runs the model a second time for every token")
    if any(isinstance(p, SynthIDTextWatermarkLogitsProcessor) for p in processors):
        raise InputError("SynthID watermarks are not supported: they count calls, and guesses would count too")
    mask = model_kwargs.get("attention_mask")
    if mask is not None and not bool(torch.as_tensor(mask).bool().all()):
        raise InputError("the attention mask hides some tokens (padding); pass the text without them")
    for name in _CACHES:
        past = model_kwargs.get(name)
        if past is not None and past.get_seq_length() > 0:
            raise InputError("a cache that holds tokens is not supported; pass the whole text as token ids")
    for name, value in model_kwargs.items():
        empty = value is None or (isinstance(value, dict) and not value)  # of images that are not there
        if not empty and name not in _KNOWN_INPUTS:
            raise InputError(f"{name} is not supported; pass token ids alone")
    positions = model_kwargs.get("position_ids")
    if positions is not None and positions.flatten().tolist() != list(range(input_ids.shape[1])):
        raise InputError("position_ids other than 0, 1, 2 and so on are not supported; leave them out")
    if config.max_length <= input_ids.shape[1]:
        raise InputError("there is nothing to generate: ask for at least 1 new token")
