"""Decoders that call their layers otherwise than nearly all do."""

import pytest
import transformers
from torch import nn
from transformers.models.gptj import modeling_gptj

from offload_triforce import TriForce, UnsupportedModelError
from offload_triforce.model.layers import find_layers, layers_of
from tests.tiny import greedy, prompt_ids

SMALL = {"budget": 64, "chunk": 4, "sink": 4, "recent": 16, "tile": 16, "gamma": 4, "prefill_chunk": 64}
COMMON = {"vocab_size": 101, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 1024, "initializer_range": 0.25}
COMMON |= {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": False}


@pytest.mark.parametrize(("config", "model"), [("GPT2Config", "GPT2LMHeadModel"), ("GPTJConfig", "GPTJForCausalLM")])
def test_equals_transformers(config, model):
    """With learned positions, which are those of the text in every chunk and tree; and with rotary ones."""
    rotary = {"rotary_dim": 8} if config == "GPTJConfig" else {}
    loaded = getattr(transformers, model)(getattr(transformers, config)(**COMMON, **rotary)).eval()
    if config == "GPTJConfig" and not hasattr(modeling_gptj, "ALL_ATTENTION_FUNCTIONS"):  # older releases
        with pytest.raises(UnsupportedModelError, match="computes its attention by itself"):
            TriForce(loaded, draft="ngram", **SMALL).generate(prompt_ids(20), max_new_tokens=2)
        return
    with TriForce(loaded, draft="ngram", **SMALL) as engine:
        found = engine.generate(prompt_ids(150), max_new_tokens=60, do_sample=False).token_ids
    assert found == greedy(loaded, prompt_ids(150), 60)
    assert len(set(found)) > 3


def test_what_is_no_list_of_layers():
    decoder = nn.Module()
    assert find_layers(decoder) is None
    with pytest.raises(AttributeError, match="keeps no list of decoder layers"):
        layers_of(decoder)
    decoder.h = 7
    assert find_layers(decoder) is None
    decoder.blocks = nn.ModuleList()
    assert layers_of(decoder) is decoder.blocks
