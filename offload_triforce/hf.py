"""For people who have a transformers model already: ``model.generate(..., custom_generate=triforce_generate)``."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from offload_triforce.config import Settings
from offload_triforce.drafts import DraftChoice
from offload_triforce.engine import TriForce
from offload_triforce.request import capture


def triforce_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    triforce_settings: Settings | None = None,
    triforce_draft: DraftChoice = "ngram",
    triforce_streamer: BaseStreamer | None = None,
    triforce_seed: int | None = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """A decoding method for ``model.generate``: same arguments, same answer, the KV cache in host memory.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs: from ``generate``.
        triforce_settings: how to run.
        triforce_draft: a small model, "ngram", "self" or "none", or two together as in ``TriForce``.
        triforce_streamer: a streamer (``generate`` does not hand its own ``streamer=`` on to callables).
        triforce_seed: of the draws; None takes one from torch's global generator.

    Returns:
        Token ids [1, n] of prompt and answer; with ``return_dict_in_generate`` an output that holds them and, as
        ``triforce_stats``, what was counted.
    """
    request = capture(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs)
    with TriForce(model, draft=triforce_draft, settings=triforce_settings) as engine:
        stream = engine.run(request, triforce_seed, triforce_streamer)
        for _ in stream:
            pass
    sequences = stream.result.sequences.to(input_ids.device)
    if not generation_config.return_dict_in_generate:
        return sequences
    output = GenerateDecoderOnlyOutput(sequences=sequences)
    output.triforce_stats = stream.stats
    return output
