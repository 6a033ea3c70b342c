"""What is asked for, in transformers' own terms: processors, stopping criteria, lengths.

``model.generate`` accepts a callable in place of a decoding method. Ours hands back what it was given,
so that transformers itself interprets every argument, merges the model's defaults and validates.
"""

from __future__ import annotations

import copy
import warnings
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
from transformers.generation import UnbatchedClassifierFreeGuidanceLogitsProcessor

from offload_triforce.config import Settings
from offload_triforce.errors import InputError
from offload_triforce.generation.ending import ending
from offload_triforce.generation.options import check_config, check_ranges, stop_list, tidy, token_ids
from offload_triforce.speculation.processors import check_forks, target_only
from offload_triforce.speculation.watched import Watch

DEFAULT_NEW_TOKENS = 256

# What generate() itself adds to the model's inputs for a plain text.
_CACHES = ("past_key_values", "cache")  # transformers 5.24 gave it another name
# What models that see or hear call what they see and hear.
_SENSES = ("pixel_", "image", "video", "audio", "input_features", "spectrogram", "mm_")
_KNOWN_INPUTS = {"attention_mask", "position_ids", *_CACHES, "use_cache", "logits_to_keep", "cache_position"}


@dataclass(frozen=True)
class Request:
    """One text to be continued.

    Attributes:
        prompt: token ids (n,), on the CPU.
        processors: applied to the target's scores, and to those of drafts as ``speculation.processors`` says.
        do_sample: draw, or take the best.
        criteria: looked at after every token. eos: ids that end a text.
        max_new_tokens: limit of the answer.
        watch: told the target's logits [1, V] and the token taken, once for each token of the answer, in order.
    """

    prompt: Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    do_sample: bool
    eos: frozenset[int]
    max_new_tokens: int
    watch: Watch | None = None

    def ending(self, ids: Tensor) -> str | None:
        """Why the text ends after its newest token, see ``ending``. To be asked after each one. ``ids``: (n,)."""
        return ending(self.criteria, ids)

    def target_only(self, settings: Settings) -> tuple[str, ...]:
        """The processors that drafts have to do without, if there are drafts; and a warning that they do."""
        names = target_only(self.processors) if settings.gamma else ()
        if names:
            warnings.warn(
                f"drafts are made without {', '.join(names)}: nobody has said that ids and scores are all it looks at, "
                "so only the target calls it; the answer is exact, but more drafts may be rejected than if "
                "offload_triforce.stateless or forkable declared it (docs/processors.md)",
                RuntimeWarning,
                stacklevel=2,
            )
        return names


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
    options = tidy(options, generation_config, model.generation_config)
    if generation_config is not None:
        check_ranges(generation_config)
    options = _plain_options(model, generation_config, options)
    if options.get("assistant_model") is not None:
        raise InputError("assistant_model is not supported: give the draft when the engine is made")
    for name, value in options.items():
        if value is not None and name.startswith(_SENSES):  # else generate would make embeddings of them first
            raise InputError(f"{name} is not supported: images, video and sound are not read; pass token ids alone")
    generation_config = _take_stop_strings(model, generation_config, options, tokenizer)
    options.setdefault("attention_mask", torch.ones_like(prompt))  # else generate infers padding from token ids
    asked = copy.copy(model)  # shares all but this with the model, which others may be using right now
    asked.generation_config = copy.deepcopy(model.generation_config)
    asked.generation_config.stop_strings = None  # they are among the criteria by now
    try:
        return asked.generate(
            prompt.to(model.device), generation_config=generation_config, custom_generate=as_request, **options
        )
    except (ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(" ".join(str(error).split())) from error


def as_request(
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
        eos=frozenset() if eos is None else frozenset(token_ids("eos_token_id", eos)),
        max_new_tokens=generation_config.max_length - input_ids.shape[1],
    )


def _plain_options(
    model: PreTrainedModel, generation_config: GenerationConfig | None, options: dict[str, Any]
) -> dict[str, Any]:
    """Fill in what people mean by a temperature alone, and a length where none was given."""
    temperature = options.get("temperature")
    if temperature is not None and options.get("do_sample") is None:
        options["do_sample"] = temperature > 0
        if temperature > 0 and generation_config is None:
            options.setdefault("top_k", 0)
    if options.get("do_sample") is False or temperature == 0:
        for name in ("temperature", "top_k", "top_p", "min_p"):
            options.pop(name, None)
    lengths = ("max_new_tokens", "max_length")
    given = [source for source in (generation_config, model.generation_config) if source is not None]
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
        strings = getattr(source, "stop_strings", None) if strings is None else strings
    if config is not None and config.stop_strings is not None:
        config = copy.deepcopy(config)
        config.stop_strings = None
    if not strings:
        return config
    strings = stop_list(strings)
    if tokenizer is None:
        raise InputError("stop strings need a tokenizer; load one with the model")
    given = options.get("stopping_criteria") or []
    options["stopping_criteria"] = StoppingCriteriaList([*given, StopStringCriteria(tokenizer, strings)])
    return config


def _count_tokens(positions: Tensor, tokens: int) -> bool:
    """Whether positions are 0, 1, 2 and so on: [1, n], or [axes, 1, n] where a model with eyes numbered the text."""
    return positions.shape[-1] == tokens and bool((positions.cpu() == torch.arange(tokens)).all())


def _refuse(
    defaults: GenerationConfig,
    config: GenerationConfig,
    input_ids: Tensor,
    model_kwargs: dict[str, Any],
    processors: LogitsProcessorList,
) -> None:
    check_config(config)  # first: beams have multiplied the prompt by now
    if input_ids.shape[0] != 1:
        raise InputError(f"one text at a time: got a batch of {input_ids.shape[0]}; call generate once for each")
    for name in ("cache_implementation", "prompt_lookup_num_tokens", "penalty_alpha", "dola_layers"):
        value = getattr(config, name, None)
        if value and value != getattr(defaults, name, None):
            raise InputError(f"{name} is not supported: this runtime brings its own caches and its own speculation")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name, None):
            raise InputError(f"{name} is not supported; leave it out")
    if any(isinstance(p, UnbatchedClassifierFreeGuidanceLogitsProcessor) for p in processors):
        raise InputError("guidance_scale is not supported: it runs the model a second time for every token")
    check_forks(processors)
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
    if positions is not None and not _count_tokens(positions, input_ids.shape[1]):
        raise InputError("position_ids other than 0, 1, 2 and so on are not supported; leave them out")
    if config.max_length <= input_ids.shape[1]:
        raise InputError("there is nothing to generate: ask for at least 1 new token")
