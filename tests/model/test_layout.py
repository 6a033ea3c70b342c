"""What the probe finds out about a model, and what it refuses by name before any work starts."""

import pytest
import torch
import transformers
from transformers import AttentionInterface

from offload_triforce import TriForce, UnsupportedModelError
from offload_triforce.cache.sizes import RecurrentShape
from offload_triforce.model.adapter import ATTENTION_NAME, attached
from offload_triforce.model.layout import LayerShape, probe
from offload_triforce.model.shape import shape_of
from tests.tiny import FAMILIES, RECURRENT, VOCABULARY, build, greedy, prompt_ids, tiny_config, tiny_model

# Family -> (KV heads, head dimension, window of each layer); others have 2 heads of 8 without a window.
SHAPES = {
    "llama": (1, 12, [None] * 3),
    "qwen2": (3, 16, [None] * 2),
    "qwen2-sliding": (2, 8, [None, 45, 45]),
    "qwen3": (1, 16, [None] * 2),
    "mistral-sliding": (2, 8, [51, 51]),
    "phi3": (3, 8, [None] * 2),
    "gemma2": (2, 10, [37, None, 37]),
    "gemma3": (2, 10, [37, None, 37]),
    "gpt-oss": (2, 8, [37, None, 37]),
}


def test_heads_of_several_sizes():
    """Full layers have other heads than sliding ones; those that read others' keys and values count as any other."""
    sliding, full, shared = LayerShape(2, 8, 37), LayerShape(1, 16, None), LayerShape(2, 16, None)
    assert probe(tiny_model("gemma4")).layers == (sliding, full, full)
    assert probe(tiny_model("gemma4-shared")).layers == (sliding, shared, sliding, shared, shared)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - RECURRENT - {"gemma4", "gemma4-shared"}))
def test_finds_shapes_out(family):
    model = tiny_model(family)
    layout = probe(model)
    heads, dim, windows = SHAPES.get(family, (2, 8, [None, None]))
    assert layout.layers == tuple(LayerShape(heads, dim, window) for window in windows)
    assert layout.full == [i for i, window in enumerate(windows) if window is None]
    assert layout.sliding == [i for i, window in enumerate(windows) if window is not None]
    assert (layout.dtype, layout.device, layout.max_positions) == (torch.float32, torch.device("cpu"), 2048)
    assert layout.token_bytes(0) == 2 * heads * dim * 4
    switches = {"llama-longrope": 128, "phi3-longrope": 128, "phi3-longrope-below": 1024}
    assert layout.longrope_switch == switches.get(family)
    assert model.config._attn_implementation == ("eager" if family in ("gemma2", "gpt-oss") else "sdpa")


@pytest.mark.parametrize("family", sorted(RECURRENT))
def test_recurrent_layers_are_found(family):
    layout, keys = probe(tiny_model(family)), 4 if family == "olmo-hybrid" else 2
    state = RecurrentShape(keys, 4, 12, 10, 2 * keys * 12 + 4 * 10, 4)
    attends = LayerShape(2, 8, None)
    assert layout.layers == (state, attends, state, state)
    assert (layout.full, layout.sliding, layout.recurrent, layout.attention) == ([1], [], [0, 2, 3], [attends])
    assert (layout.token_bytes(0), layout.reach(0, 50), layout.reach(1, 50)) == (0, 0, 50)


def test_dtype_is_the_model_s():
    layout = probe(tiny_model().to(torch.bfloat16))
    assert layout.dtype == torch.bfloat16
    assert layout.token_bytes(0) == 2 * 12 * 2


def test_layers_of_different_shapes():
    """Gemma-4 gives full layers a larger head dimension: that is fine between kinds, and refused within one."""
    model = tiny_model("gemma3")
    model.model.layers[1].self_attn.head_dim = 10  # as it is
    assert probe(model).layers[1].head_dim == 10
    short = torch.nn.Linear(48, 10, bias=False)
    model.model.layers[0].self_attn.k_proj = model.model.layers[0].self_attn.v_proj = short
    with pytest.raises(UnsupportedModelError, match="sliding-window layers of Gemma3ForCausalLM differ in their KV"):
        probe(model)


def gpt2():
    settings = {"n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 512, "initializer_range": 0.2}
    config = transformers.GPT2Config(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=None, **settings)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.transformer.stack = model.transformer.h
    del model.transformer.h
    return model


def t5():
    settings = {"d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 6, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=VOCABULARY, **settings))


def bart(cls):
    settings = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("layers", 2), ("ffn_dim", 64))}
    heads = {"encoder_attention_heads": 6, "decoder_attention_heads": 6}
    return cls(transformers.BartConfig(vocab_size=VOCABULARY, d_model=48, init_std=0.2, **settings, **heads)).eval()


_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_MLA |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
_MLA |= {"num_key_value_heads": 6}
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_FALCON = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
_CHUNKED = {"head_dim": 8, "attention_chunk_size": 32, "num_local_experts": 2, "intermediate_size_mlp": 32}

REFUSED = {
    "encoder-decoder": (t5, "T5ForConditionalGeneration is an encoder-decoder"),
    "encoder-decoder with registry": (
        lambda: bart(transformers.BartForConditionalGeneration),
        "BartForConditionalGeneration is an encoder-decoder",
    ),
    "dynamic NTK": (
        lambda: build("Llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        "LlamaForCausalLM uses dynamic NTK rotary scaling.*'yarn' or 'linear'",
    ),
    "state space": (
        lambda: build("Mamba", state_size=4),
        "MambaForCausalLM has 2 of 2 layers of type 'linear_attention'",
    ),
    "MLA, DeepSeek-V2": (lambda: build("DeepseekV2", **_MLA), "values of another size than its keys.*MLA"),
    "MLA, DeepSeek-V3": (lambda: build("DeepseekV3", **_MLA), "values of another size than its keys.*MLA"),
    "ALiBi": (
        lambda: transformers.BloomForCausalLM(
            transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=48, n_layer=2, n_head=6)
        ),
        "BloomForCausalLM counts positions by itself",
    ),
    "layers under another name": (gpt2, "GPT2LMHeadModel does not keep its decoder layers in a list"),
    "chunked attention": (
        lambda: transformers.Llama4ForCausalLM(
            transformers.Llama4TextConfig(
                vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, **_CHUNKED
            )
        ),
        "Llama4ForCausalLM has 2 of 2 layers of type 'chunked_attention'",
    ),
    "window known to the mask alone": (
        lambda: build("Phimoe", sliding_window=20, **_MOE),
        "PhimoeForCausalLM does not tell its attention function about the sliding window of layer 0",
    ),
    "state beside attention": (
        lambda: build("FalconH1", **_FALCON),
        "FalconH1ForCausalLM has 2 of 2 layers of type 'hybrid'",
    ),
    "keywords that do not reach attention": (
        lambda: build("StableLm"),
        "StableLmForCausalLM does not hand keywords down to its attention",
    ),
    "positions that nobody asks for": (lambda: bart(transformers.BartForCausalLM), "BartForCausalLM"),
    "two attentions per layer": (lambda: build("DiffLlama"), "DiffLlamaForCausalLM: layer 0 attends more than once"),
    "attention of its own": (
        lambda: build("GPTNeoXJapanese"),
        "GPTNeoXJapaneseForCausalLM computes its attention by itself and not through",
    ),
    "layers that give back more than hidden states": (
        lambda: build("Bamba", mamba_n_heads=4, mamba_d_head=24, mamba_d_state=8, attn_layer_indices=[0, 1]),
        "BambaForCausalLM has decoder layers that give back something else than hidden states",
    ),
    "no head that predicts tokens": (
        lambda: transformers.LlamaForSequenceClassification(tiny_config("Llama")),
        "LlamaForSequenceClassification does not predict tokens; load it with AutoModelForCausalLM",
    ),
}


def assert_refused(make, words):
    model = make()
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=words) as error:
        TriForce(model)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 300
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_by_name(make, words):
    assert_refused(make, words)


def test_refused_as_draft():
    with pytest.raises(UnsupportedModelError, match=r"values of another size than its keys.*MLA"):
        TriForce(tiny_model(), draft=build("DeepseekV2", **_MLA))


def opt():
    settings = {"word_embed_proj_dim": 48, "ffn_dim": 64, "num_attention_heads": 6, "max_position_embeddings": 512}
    ids = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "vocab_size": VOCABULARY}
    torch.manual_seed(2)
    config = transformers.OPTConfig(hidden_size=48, num_hidden_layers=2, init_std=0.4, **settings, **ids)
    return transformers.OPTForCausalLM(config).eval()


def gemma3_with_eyes():
    """What AutoModelForCausalLM makes of Gemma-3 checkpoints from 4B on."""
    config = tiny_model("gemma3").config.to_dict()
    eyes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    eyes |= {"image_size": 28, "patch_size": 14}
    both = {"text_config": config, "vision_config": eyes, "mm_tokens_per_image": 4, "tie_word_embeddings": False}
    torch.manual_seed(0)
    return transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(**both)).eval()


_SINKS = {"sliding_window": 20, "attn_implementation": "eager"}
_MIMO = {"head_dim": 8, "v_head_dim": 8, "num_attention_heads": 12, "n_routed_experts": 4, "num_experts_per_tok": 2}
_MIMO |= {"moe_intermediate_size": 24, "layer_types": ["full_attention", "sliding_attention"]}


# Beyond the promised families: whatever goes through the registry works without a line of its own.
OTHERS = {
    "learned positions (OPT)": opt,
    "layers without positions (SmolLM3)": lambda: build("SmolLM3", num_hidden_layers=4),
    "partial rotary, one norm for both branches (GPT-NeoX)": lambda: build("GPTNeoX"),
    "logit scaling (Cohere-2)": lambda: build("Cohere2", num_hidden_layers=4, sliding_window=20),
    "multipliers (Granite)": lambda: build("Granite", logits_scaling=0.5, residual_multiplier=0.7),
    "MLA with values as large as keys": lambda: build("DeepseekV3", **{**_MLA, "v_head_dim": 16}),
    "sinks beside the softmax (Granite, sliding)": lambda: build("GraniteSWA", **_SINKS),
    "sinks in sliding layers alone, with more KV heads (MiMo-V2)": lambda: build("MiMoV2Flash", **_SINKS, **_MIMO),
    "text alone, of a model for images too (Gemma-3)": gemma3_with_eyes,
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_other_families_work(make):
    model, prompt = make(), prompt_ids(150)
    settings = {"budget": 48, "gamma": 4, "chunk": 4, "sink": 4, "recent": 16, "tile": 16, "draft_cache": 64}
    with TriForce(model, draft="ngram", prefill_chunk=33, **settings) as engine:
        result = engine.generate(prompt, max_new_tokens=30, do_sample=False)
    expected = greedy(model, prompt, 30)
    assert len(set(expected)) > 3
    assert result.token_ids == expected


def test_attention_of_ours_does_not_run_outside():
    model = tiny_model()
    assert ATTENTION_NAME in AttentionInterface.valid_keys(AttentionInterface())
    with attached(model), pytest.raises(UnsupportedModelError, match="without a cache of offload-triforce"):
        model(prompt_ids(3))
    assert model.config._attn_implementation == "sdpa"


def test_attached_gives_each_its_own_back():
    """The draft may be the target itself, or nobody."""
    first, second = tiny_model(), tiny_model("qwen3")
    second.set_attn_implementation("eager")
    with attached(first, second, first, None):
        assert first.config._attn_implementation == second.config._attn_implementation == ATTENTION_NAME
    assert (first.config._attn_implementation, second.config._attn_implementation) == ("sdpa", "eager")


@pytest.mark.parametrize(("window", "found"), [(2048, None), (5000, None), (2047, 2047)])
def test_a_window_that_no_text_outgrows_is_none(window, found):
    """Phi-3-mini-128K has one of 262,144 tokens: its layers see everything, so they are streamed like others."""
    model = tiny_model("mistral-sliding", seed=1, calm=True, sliding_window=window)
    layout = probe(model)
    assert [layer.window for layer in layout.layers] == [found] * 2
    assert shape_of(model.config, torch.float32).layout.layers == layout.layers
    with TriForce(model, draft="ngram", budget=64, tile=16, recent=16, link_gbps=1000.0) as engine:
        result = engine.generate(prompt_ids(120), max_new_tokens=40, do_sample=False)
    assert result.token_ids == greedy(model, prompt_ids(120), 40)
    assert (result.stats.link_bytes > 0) == (found is None)
