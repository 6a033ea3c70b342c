"""What arrives at the attention function: what we do not honour is refused, as the engine is made."""

import pytest
import torch
import transformers
from torch import nn

from offload_triforce import TriForce, UnsupportedModelError
from offload_triforce.kernels.ops import AttentionParams
from offload_triforce.model.adapter import _attention
from tests.tiny import VOCABULARY, greedy, prompt_ids, tiny_model


class View:
    """Notes the rules of each call, and attends to nothing."""

    def __init__(self):
        self.seen = []

    def attend(self, layer, query, key, value, params):
        self.seen.append((layer, params))
        return query


class Layer(nn.Module):
    layer_idx = 3


def call(module=None, tokens=2, keys=None, mask=None, texts=1, **keywords):
    view, keys = View(), tokens if keys is None else keys
    query, key = torch.zeros(texts, 6, tokens, 8), torch.zeros(texts, 2, keys, 8)
    output, weights = _attention(module or Layer(), query, key, key, mask, triforce=view, **keywords)
    assert output.shape == (texts, tokens, 6, 8)
    assert weights is None
    return view.seen


# Everything that any model of transformers 5.24 hands to its attention function, by what becomes of it.
SINKS = torch.arange(6.0)
HONOURED = {"scaling": 0.5, "sliding_window": 7, "softcap": 30.0, "s_aux": SINKS}
HARMLESS = {
    "position_ids": torch.arange(2)[None],
    "cache_position": torch.arange(2),
    "use_cache": False,
    "output_attentions": False,
    "output_router_logits": False,
    "logits_to_keep": 1,
    "past_key_values": None,
    "dropout": 0.0,
    "is_causal": True,
    "labels": None,
    "encoder_hidden_states": None,
    "s_aux": None,
    "sinks": None,
    "position_bias": None,
    "block_indices": None,
    "indices": None,
    "cu_seq_lens_q": None,
    "max_length_q": None,
}
REFUSED = {
    "s_aux": (torch.zeros(2, 6), r"has learned attention sinks of shape \[2, 6\]; only one number for each of its 6"),
    "sinks": (torch.zeros(1, 6, 2, 1), "attention sinks that are computed for each token"),
    "position_bias": (torch.zeros(1, 6, 2, 2), "additive position biases"),
    "indices": (torch.zeros(1, 2, 2), "sparse attention"),
    "block_indices": (torch.zeros(1, 2, 2), "sparse attention"),
    "cu_seq_lens_q": (torch.zeros(2), "packed sequences"),
    "cu_seq_lens_k": (torch.zeros(2), "packed sequences"),
    "max_length_q": (2, "calls its attention with 'max_length_q', whose meaning is not known here"),
    "encoder_hidden_states": (torch.zeros(1, 2, 48), "cross-attention"),
    "is_causal": (False, "attends to later tokens too"),
    "dropout": (0.1, r"drops 10% of its attention at random; call the model's eval\(\)"),
    "deterministic": (True, "calls its attention with 'deterministic', whose meaning is not known here"),
    "head_mask": (torch.ones(6), "calls its attention with 'head_mask', whose meaning is not known here"),
    "what_nobody_knows_yet": (0.5, "calls its attention with 'what_nobody_knows_yet', whose meaning is not known here"),
}


def test_what_is_honoured():
    assert call(**HONOURED) == [(3, AttentionParams(0.5, 7, 30.0, SINKS))]
    assert call() == [(3, AttentionParams(8**-0.5, None, None, None))]


def test_what_changes_nothing():
    assert call(**HARMLESS) == call()


@pytest.mark.parametrize("keyword", REFUSED)
def test_what_is_refused(keyword):
    value, words = REFUSED[keyword]
    with pytest.raises(UnsupportedModelError, match=f"^Layer .*{words}") as error:
        call(**{keyword: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"mask": torch.zeros(1, 1, 2, 2)}, "brings an attention mask of its own"),
        ({"mask": torch.ones(1, 1, 2, 2, dtype=torch.bool)}, "brings an attention mask of its own"),
        ({"texts": 2}, "reads 2 texts at a time"),
        ({"keys": 5}, "makes 5 keys of 2 tokens"),
    ],
)
def test_shapes_and_masks_that_are_refused(how, words):
    with pytest.raises(UnsupportedModelError, match=f"Layer {words}"):
        call(**how)


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("attribute", [None, True, False])
@pytest.mark.parametrize("keyword", [None, True, False])
def test_who_says_whether_it_is_causal(attribute, keyword, tokens):
    """The keyword before the module, as for transformers' own functions; a single token has no later ones."""
    module = Layer()
    if attribute is not None:
        module.is_causal = attribute
    causal = keyword if keyword is not None else attribute is not False
    given = {} if keyword is None else {"is_causal": keyword}
    if causal or tokens == 1:
        assert call(module, tokens, **given)
    else:
        with pytest.raises(UnsupportedModelError, match="attends to later tokens too"):
            call(module, tokens, **given)


# --- whole models


def doge():
    """It adds a mask of its own, learned, to the scores; it may look like any other decoder from outside."""
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6}
    torch.manual_seed(0)
    config = transformers.DogeConfig(
        vocab_size=VOCABULARY, num_key_value_heads=2, initializer_range=0.25, **sizes, pad_token_id=0
    )
    model = transformers.DogeForCausalLM(config).eval()
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.A)
    return model


def reading_both_ways():
    model = tiny_model()
    model.model.layers[1].self_attn.is_causal = False
    return model


def dropping():
    return tiny_model("llama", attention_dropout=0.1).train()


def with_sinks_of_groups():
    """A number for each KV head, of which there are two."""
    model = tiny_model("gpt-oss")
    model.model.layers[1].self_attn.sinks = nn.Parameter(torch.zeros(2))
    return model


MODELS = {
    "a mask of its own": (doge, "DogeForCausalLM masks its attention by what the values say"),
    "both ways": (reading_both_ways, "LlamaAttention attends to later tokens too"),
    "training": (dropping, r"LlamaAttention drops 10% of its attention at random; call the model's eval\(\)"),
    "sinks": (with_sinks_of_groups, r"GptOssAttention has learned attention sinks of shape \[2\]"),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("role", ["target", "draft"])
def test_models_are_refused_as_the_engine_is_made(kind, role):
    make, words = MODELS[kind]
    model = make()
    with pytest.raises(UnsupportedModelError, match=words):
        TriForce(model) if role == "target" else TriForce(tiny_model(), draft=model)
    assert model.config._attn_implementation != "offload_triforce"


def test_a_mask_that_is_made_for_several_tokens_alone_is_found():
    """The probe reads two tokens: of one, a causal mask hides nothing."""
    model = tiny_model()
    attention = model.model.layers[2].self_attn
    own = attention.forward

    def forward(hidden_states, *args, attention_mask=None, **kwargs):
        if hidden_states.shape[1] > 1:
            attention_mask = hidden_states.new_zeros(1, 1, 1, 1)
        return own(hidden_states, *args, attention_mask=attention_mask, **kwargs)

    attention.forward = forward
    with pytest.raises(UnsupportedModelError, match="brings an attention mask of its own"):
        TriForce(model)


def test_training_without_dropout_is_no_obstacle():
    model, prompt = tiny_model().train(), prompt_ids(60)
    with TriForce(model, draft="none", context=128) as engine:
        answer = engine.generate(prompt, max_new_tokens=12, do_sample=False)
    assert answer.token_ids == greedy(model, prompt, 12)
