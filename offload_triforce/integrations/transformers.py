"""For people who have a transformers model already: ``model.generate(..., custom_generate=triforce_generate)``."""

from __future__ import annotations

import inspect
import sys
from contextlib import nullcontext
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from offload_triforce.config import Settings
from offload_triforce.engine import TriForce
from offload_triforce.errors import InputError
from offload_triforce.generation.request import as_request
from offload_triforce.model.lock import check_idle
from offload_triforce.runtime.drafters import DraftChoice


def triforce_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    triforce_settings: Settings | None = None,
    triforce_draft: DraftChoice = "auto",
    triforce_streamer: BaseStreamer | None = None,
    triforce_seed: int | None = None,
    triforce_wait: bool = True,
    triforce_engine: TriForce | None = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """A decoding method for ``model.generate``: same arguments, same answer, the KV cache in host memory.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs: from ``generate``.
        triforce_settings: how to run.
        triforce_draft: a small model, "auto", "ngram", "mtp", "self" or "none", or two together as in ``TriForce``.
        triforce_streamer: a streamer, where this is not called by ``generate``; else ``streamer=`` does the same.
        triforce_seed: of the draws; None takes one from torch's global generator.
        triforce_wait: for other threads' steps with the same model; False: a ``BusyError`` if there is one right now.
        triforce_engine: an engine of this model, in place of settings and draft. It outlives the call, so that the next
            one reads only what is new.

    Returns:
        Token ids [1, n] of prompt and answer; with ``return_dict_in_generate`` an output that holds them and, as
        ``triforce_stats``, what was counted.

    Raises:
        InputError, UnsupportedModelError, MemoryLimitError: one sentence each, before the work starts.
    """
    given = _streamer_of_generate()
    if given is not None and triforce_streamer is not None:
        raise InputError("streamer and triforce_streamer are the same; give one of them")
    streamer = _AfterPrompt(given) if given is not None else triforce_streamer
    request = as_request(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs)
    if not triforce_wait:
        check_idle([model])
    if triforce_engine is not None and triforce_engine.model is not model:
        raise InputError("triforce_engine is of another model; make one with TriForce(model)")
    own = TriForce(model, draft=triforce_draft, settings=triforce_settings) if triforce_engine is None else None
    with own or nullcontext(triforce_engine) as engine:
        stream = engine.run(request, triforce_seed, streamer, wait=triforce_wait)
        for _ in stream:
            pass
    sequences = stream.result.sequences.to(input_ids.device)
    if not generation_config.return_dict_in_generate:
        return sequences
    output = GenerateDecoderOnlyOutput(sequences=sequences)
    output.triforce_stats = stream.stats
    return output


class _AfterPrompt(BaseStreamer):
    """A streamer that ``generate`` has shown the prompt already."""

    def __init__(self, streamer: BaseStreamer) -> None:
        self._streamer, self._prompt_shown = streamer, False

    def put(self, value: Tensor) -> None:
        if self._prompt_shown:
            self._streamer.put(value)
        self._prompt_shown = True

    def end(self) -> None:
        self._streamer.end()


def _streamer_of_generate() -> BaseStreamer | None:
    """The ``streamer=`` of the ``generate`` call that calls ``triforce_generate``; None if there is none.

    transformers hands every keyword of its own decoding methods on to them, but not to a callable. Without a look at
    the caller, the streamer would get the prompt and then nothing: a reader in another thread would wait for ever.
    """
    caller = sys._getframe(2)
    if caller.f_code is not inspect.unwrap(GenerationMixin.generate).__code__:
        return None
    streamer: BaseStreamer | None = caller.f_locals.get("streamer")
    return streamer
