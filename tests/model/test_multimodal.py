"""Checkpoints of models that see as well: their text decoder alone is loaded, and says what the whole model says."""

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from benchmarks.family_audit import try_case
from benchmarks.family_cases import Case
from offload_triforce import InputError, TriForce, UnsupportedModelError
from offload_triforce.model import tested
from offload_triforce.model.loader import load_model
from offload_triforce.model.multimodal import TEXT_ALONE, loaded_config, loading_options
from offload_triforce.model.refusals import refuse_unloadable
from offload_triforce.model.shape import shape_of
from offload_triforce.model.text_part import LeftOut, maker
from offload_triforce.model.weights import count
from offload_triforce.planner.models import find_shape
from tests.byte_tokenizer import byte_tokenizer

CPU = torch.device("cpu")
SMALL = {"budget": 64, "chunk": 4, "sink": 4, "recent": 16, "tile": 16, "draft_cache": 64, "gamma": 4}
WORDS = "To be, or not to be, that is the question: to be, or not to be, that"

COMMON = {"vocab_size": 270, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
COMMON |= {"max_position_embeddings": 4096, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": None}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
LINEAR |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
THREE_AXES = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2]}
THREE_AXES |= {"mrope_interleaved": True}
QWEN = COMMON | LINEAR | {"head_dim": 32, "num_hidden_layers": 4, "rope_parameters": THREE_AXES}
EXPERTS = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
EXPERTS |= {"num_experts": 4, "num_experts_per_tok": 2}
MISTRAL = COMMON | {"model_type": "mistral", "head_dim": 16, "num_hidden_layers": 2, "intermediate_size": 96}
MISTRAL |= {"sliding_window": None, "tie_word_embeddings": False}
EYES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
EYES |= {"image_size": 32, "patch_size": 8}
QWEN_EYES = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
IMAGES = {"image_token_id": 265, "video_token_id": 266, "vision_start_token_id": 267, "vision_end_token_id": 268}

GEMMA = COMMON | {"head_dim": 16, "num_hidden_layers": 3, "intermediate_size": 96, "sliding_window": 24}
GEMMA |= {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "tie_word_embeddings": False}
GEMMA4 = GEMMA | {"global_head_dim": 32, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 270}
BY_AXES = COMMON | {"head_dim": 16, "num_hidden_layers": 2, "intermediate_size": 96, "tie_word_embeddings": False}
AXES = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}

# The whole model, and what is loaded of it.
KINDS = {
    "qwen3_5": (
        {"text_config": QWEN | {"intermediate_size": 96}, "vision_config": QWEN_EYES, **IMAGES},
        "Qwen3_5ForCausalLM",
    ),
    "qwen3_5_moe": ({"text_config": QWEN | EXPERTS, "vision_config": QWEN_EYES, **IMAGES}, "Qwen3_5MoeForCausalLM"),
    "mistral3": (
        {
            "text_config": MISTRAL,
            "vision_config": EYES | {"model_type": "pixtral", "head_dim": 16},
            "image_token_index": 265,
            "tie_word_embeddings": False,
        },
        "MistralForCausalLM",
    ),
    "gemma3": (
        {
            "text_config": GEMMA | {"query_pre_attn_scalar": 16},
            "vision_config": EYES | {"model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
            "image_token_id": 265,
            "tie_word_embeddings": False,
        },
        "Gemma3ForCausalLM",
    ),
    "gemma4": (
        {
            "text_config": GEMMA4 | {"num_kv_shared_layers": 0},
            "vision_config": {**EYES, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16},
            "audio_config": None,
            "image_token_id": 265,
            "tie_word_embeddings": False,
        },
        "Gemma4ForCausalLM",
    ),
    "qwen2_5_vl": (
        {"text_config": BY_AXES | {"rope_parameters": AXES}, "vision_config": QWEN_EYES, **IMAGES},
        "Qwen2_5_VLForConditionalGeneration",
    ),
    "qwen3_vl": (
        {
            "text_config": BY_AXES | {"rope_parameters": {**AXES, "mrope_interleaved": True}},
            "vision_config": QWEN_EYES | {"deepstack_visual_indexes": [0]},
            **IMAGES,
        },
        "Qwen3VLForConditionalGeneration",
    ),
    "glm4v": (
        {"text_config": BY_AXES | {"rope_parameters": AXES}, "vision_config": QWEN_EYES | {"image_size": 32}, **IMAGES},
        "Glm4vForConditionalGeneration",
    ),
    "llava_next": (
        {
            "text_config": MISTRAL,
            "vision_config": EYES | {"model_type": "clip_vision_model", "projection_dim": 32},
            "image_token_index": 265,
        },
        "LlavaNextForConditionalGeneration",
    ),
    "internvl": (
        {
            "text_config": BY_AXES | {"model_type": "qwen3"},
            "vision_config": EYES | {"image_size": [32, 32], "patch_size": [8, 8]},
            "image_token_id": 265,
            "tie_word_embeddings": False,
        },
        "InternVLForConditionalGeneration",
    ),
    "llava": (
        {
            "text_config": MISTRAL,
            "vision_config": EYES | {"model_type": "clip_vision_model", "projection_dim": 32},
            "image_token_index": 265,
        },
        "MistralForCausalLM",
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    """A whole model of random weights, and the folder that it is saved in."""
    changes, loaded = KINDS[request.param]
    if not hasattr(transformers, loaded):
        pytest.skip(f"transformers {transformers.__version__} has no {loaded}")
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(AutoConfig.for_model(request.param, **changes)).eval()
    folder = tmp_path_factory.mktemp(request.param)
    whole.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return whole, folder, loaded


def answer(whole, ids, tokens=24):
    found = whole.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None)
    return found[0, ids.shape[1] :].tolist()


def test_decodes_as_the_whole_model_does(saved):
    """With drafts, and with tokens on three axes in the whole model: for a text all three are the same."""
    whole, folder, loaded = saved
    # No streaming cache holds heads of several sizes, nor can it follow how GLM-4V turns its keys.
    draft = "ngram" if loaded.startswith(("Gemma4", "Glm4v")) else "self"
    with TriForce.load(str(folder), draft=draft, dtype="float32", device="cpu", **SMALL) as engine:
        result = engine.generate(WORDS, max_new_tokens=24, do_sample=False)
    assert result.token_ids == answer(whole, torch.tensor([result.prompt_ids]))
    assert len(set(result.token_ids)) > 3, "a model that says the same all the time would prove little"


def test_only_the_text_decoder_is_loaded(saved):
    whole, folder, loaded = saved
    model, _ = load_model(str(folder), torch.float32, CPU)
    assert type(model).__name__ == loaded
    sees = sum(weight.numel() for name, weight in whole.named_parameters() if "language_model" not in name)
    sees -= whole.lm_head.weight.numel()
    assert sees > 0
    newline = 64 if loaded == "LlavaNextForConditionalGeneration" else 0  # a parameter beside the parts
    assert model.num_parameters() == whole.num_parameters() - sees + newline


def test_names_of_weights_in_newer_files(saved, tmp_path):
    """The same weights, named as the whole model has them in memory."""
    whole, folder, loaded = saved
    if set(safe_open(folder / "model.safetensors", "pt").keys()) & set(whole.state_dict()) - {"lm_head.weight"}:
        pytest.skip("their files have one way to name them")
    if loaded.startswith("Gemma4"):
        pytest.skip("transformers finds both by itself")
    for file in folder.iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(dict(whole.state_dict()), tmp_path / "model.safetensors", {"format": "pt"})
    named = [set(safe_open(place / "model.safetensors", "pt").keys()) for place in (folder, tmp_path)]
    assert named[0] & named[1] <= {"lm_head.weight"}
    one, other = (load_model(str(place), torch.float32, CPU)[0].state_dict() for place in (folder, tmp_path))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_plans_the_text_decoder_from_the_configuration_alone(saved):
    whole, folder, _ = saved
    model, _ = load_model(str(folder), torch.bfloat16, CPU)
    planned = find_shape(str(folder / "config.json"), torch.bfloat16)
    assert planned.counts == count(model)
    if type(model) is not maker(whole.config):  # its decoder is a model of its own
        assert planned.counts == shape_of(whole.config.get_text_config(), torch.bfloat16).counts
    assert planned.weights.parameters < whole.num_parameters()


def test_weights_that_are_missing_are_said(saved, tmp_path):
    _, folder, _ = saved
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if "vis" not in name and name.endswith("layers.1.input_layernorm.weight"))
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="lack 1 of the weights"):
        load_model(str(tmp_path), torch.float32, CPU)


@pytest.mark.parametrize("kind", sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES))
def test_every_family_that_sees_is_taken_as_text_or_refused_in_one_sentence(kind):
    """By its configuration, before anything is built: all that transformers reads images with."""
    try:
        config = CONFIG_MAPPING[kind]()
    except Exception:
        pytest.skip("its configuration has no defaults")
    refused = None
    try:
        refuse_unloadable(loaded_config(config))
        loading_options(config)
    except UnsupportedModelError as error:
        refused = str(error)
    if kind in ("qwen2_5_vl", "qwen3_vl", "glm4v", "llava_next", "internvl", "idefics3"):
        assert refused is None
    if refused is None:
        assert loaded_config(config).model_type != kind or kind not in TEXT_ALONE
    else:
        assert kind not in TEXT_ALONE
        assert "\n" not in refused
        assert len(refused) < 300


def test_no_weights_of_other_parts(saved):
    """Those that are made by their own class have something else where these were, which takes no images."""
    whole, folder, loaded = saved
    model, _ = load_model(str(folder), torch.float32, CPU)
    left = [part for part in model.modules() if isinstance(part, LeftOut)]
    assert bool(left) == (loaded == type(whole).__name__)
    assert not any(list(part.parameters()) for part in left)
    if not left:
        return
    assert isinstance(model, type(whole))
    assert left[0].device == model.device
    assert left[0].dtype == model.dtype
    with pytest.raises(InputError, match=rf"only the text decoder of {loaded} is loaded, without \w+; pass text alone"):
        left[0](torch.zeros(1))


def test_images_are_refused(saved):
    _, folder, _ = saved
    given = {"max_new_tokens": 2, "pixel_values": torch.zeros(1, 3, 32, 32)}
    with (
        TriForce.load(str(folder), draft="ngram", dtype="float32", device="cpu", **SMALL) as engine,
        pytest.raises(InputError, match="pixel_values is not supported: images, video and sound are not read"),
    ):
        engine.generate(torch.arange(3, 40)[None], **given)


@pytest.mark.parametrize("kind", ["qwen3_vl", "glm4v"])
def test_a_whole_model_that_is_there_is_taken(kind):
    """With eyes and all: what it sees with takes no part. Positions on three or four axes are those of a text."""
    changes, name = KINDS[kind]
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **changes)).eval()
    prompt = torch.randint(3, 250, (1, 60), generator=torch.Generator().manual_seed(1))
    with TriForce(whole, draft="ngram", **SMALL) as engine:
        assert engine.generate(prompt, max_new_tokens=20, do_sample=False).token_ids == answer(whole, prompt, 20)
        axes = torch.arange(60).expand(3, 1, 60).clone()
        axes[1, 0, 30:] += 1
        with pytest.raises(InputError, match="position_ids other than 0, 1, 2"):
            engine.generate(prompt, max_new_tokens=2, position_ids=axes)


def test_a_text_decoder_of_any_family_has_to_be_tested_too(monkeypatch):
    changes, name = KINDS["llava_next"]
    torch.manual_seed(0)
    config = AutoConfig.for_model("llava_next", **changes)
    model = maker(config).from_config(config)
    assert type(model).__name__ == name
    monkeypatch.setattr(tested, "TESTED", {"llava_next", "mistral"})
    assert tested.is_tested(model)
    for alone in ("llava_next", "mistral"):
        monkeypatch.setattr(tested, "TESTED", {alone})
        assert not tested.is_tested(model)


# Whatever else transformers has, as the page of models has it: one of eight in the normal run.
SEEING = sorted(set(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES) - set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if i % 8 else ()) for i, kind in enumerate(SEEING)]
)
def test_never_other_tokens(kind):
    """From the files of a tiny random model: the whole model's own tokens, or refused."""
    found = try_case(Case(kind))
    assert found.verdict in ("equal", "refused", "unbuilt"), found.why
