"""The one table of names: what each row says against transformers' own models and against published numbers."""

import pytest
import torch
from transformers import AutoConfig

from offload_triforce.machine.packages import reads_mtp_heads
from offload_triforce.model.known import PlainConfig
from offload_triforce.model.names import MODELS, find_known, hub_id, nearest
from offload_triforce.model.outline import shape_of_known
from offload_triforce.model.shape import shape_of
from offload_triforce.planner.sizes import rotary_numbers

# Published number of parameters (of the files on the hub, in millions; tied weights once), KV bytes per token in 16
# bits (full layers alone), and the numbers of full and sliding layers. KV by hand: 2 x 2 bytes x KV heads x head
# dimension x layers. Of Qwen2.5-Coder-1.5B, the GGUF file's 1,777 million: its output embedding is not tied. Of the
# Qwen3.6 models the text decoder alone: of the 27,781 million in the files of the 27B (55.56 GB in all, as its index
# says), 460 are of the image tower and 425 of a head for several tokens at once; of the 35B by hand. Of Gemma 4 31B and
# Mistral Small 3.2 likewise the text decoder: 30.7 thousand million, says the card of the former.
EXPECTED = {
    "SmolLM2-135M-Instruct": (134.515, 4 * 3 * 64 * 30, 30, 0),
    "Qwen2.5-Coder-1.5B-Instruct": (1777.088, 4 * 2 * 128 * 28, 28, 0),
    "Llama-2-7B-128K": (6738, 4 * 32 * 128 * 32, 32, 0),
    "Llama-3.1-8B": (8030, 4 * 8 * 128 * 32, 32, 0),
    "Llama-3.2-1B": (1235.8, 4 * 8 * 64 * 16, 16, 0),
    "Llama-3.2-3B": (3212.7, 4 * 8 * 128 * 28, 28, 0),
    "Qwen2.5-7B-1M": (7616, 4 * 4 * 128 * 28, 28, 0),
    "Qwen2.5-14B-1M": (14770, 4 * 8 * 128 * 48, 48, 0),
    "Qwen3-0.6B": (596.05, 4 * 8 * 128 * 28, 28, 0),
    "Qwen3-4B-2507": (4022.5, 4 * 8 * 128 * 36, 36, 0),
    "Qwen3-8B": (8191, 4 * 8 * 128 * 36, 36, 0),
    "Qwen3-14B": (14768, 4 * 8 * 128 * 40, 40, 0),
    "Qwen3-32B": (32762, 4 * 8 * 128 * 64, 64, 0),
    "Qwen3-30B-A3B": (30532, 4 * 4 * 128 * 48, 48, 0),
    "Qwen3-30B-A3B-2507": (30532, 4 * 4 * 128 * 48, 48, 0),
    "Qwen3.6-27B": (26896, 4 * 4 * 256 * 16, 16, 0),
    "Qwen3.6-35B-A3B": (34661, 4 * 2 * 256 * 10, 10, 0),
    "Mistral-Nemo": (12248, 4 * 8 * 128 * 40, 40, 0),
    "Mistral-Small-24B": (23572, 4 * 8 * 128 * 40, 40, 0),
    "Mistral-Small-3.2-24B": (23572, 4 * 8 * 128 * 40, 40, 0),
    "Devstral-Small-24B": (23572, 4 * 8 * 128 * 40, 40, 0),
    "Seed-OSS-36B": (36151, 4 * 8 * 128 * 64, 64, 0),
    "Phi-3-mini-128K": (3821, 4 * 32 * 96 * 32, 32, 0),
    "Gemma-3-4B": (3880, 4 * 4 * 256 * 5, 5, 29),
    "Gemma-3-12B": (11766, 4 * 8 * 256 * 8, 8, 40),
    "Gemma-3-27B": (27009, 4 * 16 * 128 * 10, 10, 52),
    "Gemma-4-31B": (30697, 4 * 4 * 512 * 10, 10, 50),
    "gpt-oss-20b": (20915, 4 * 8 * 64 * 12, 12, 12),
}


def test_all_models_are_expected():
    assert [model.title for model in MODELS] == list(EXPECTED)


@pytest.mark.parametrize("known", MODELS, ids=[model.name for model in MODELS])
def test_a_row_against_published_numbers(known):
    millions, token, full, sliding = EXPECTED[known.title]
    said = shape_of_known(known)
    assert said.weights.parameters / 1e6 == pytest.approx(millions, rel=2e-4)
    assert said.weights.total == 2 * said.weights.parameters
    assert sum(said.layout.token_bytes(i) for i in said.layout.full) == token
    assert (len(said.layout.full), len(said.layout.sliding)) == (full, sliding)


def one_of_each_type():
    """Rows, by the type of their models: the normal run builds one of each."""
    seen = set()
    for known in MODELS:
        marks = pytest.mark.slow if known.config["model_type"] in seen else ()
        seen.add(known.config["model_type"])
        yield pytest.param(known, id=known.name, marks=marks)


@pytest.mark.parametrize("known", [*one_of_each_type()])
def test_a_row_against_the_model_itself(known):
    """The table must not have a description of its own: layout and weights are those of the model that is built."""
    said, values = shape_of_known(known), dict(known.config)
    built = shape_of(AutoConfig.for_model(values.pop("model_type"), **values), torch.bfloat16)
    assert said.counts == built.counts
    if reads_mtp_heads():
        assert said.mtp == built.mtp
    assert said.embedding == built.embedding
    assert said.heads == built.heads
    for what in ("layers", "dtype", "vocabulary", "max_positions"):
        assert getattr(said.layout, what) == getattr(built.layout, what)
    numbers = [rotary_numbers(shape.config.get_text_config(), shape.layout) for shape in (said, built)]
    assert numbers[0] == numbers[1]
    for name in ("hidden_size", "intermediate_size"):  # what memory is reckoned with; some have experts alone
        texts = (shape.config.get_text_config() for shape in (said, built))
        assert len({getattr(text, name, None) for text in texts}) == 1


def test_recurrent_layers_are_those_of_the_published_shapes():
    """Qwen3.6-27B, by hand: 48 layers, each of 48 states of 128 x 128 numbers in float32; 3 + 3 inputs of 10,240."""
    layout = shape_of_known(find_known("qwen3.6-27b")).layout
    assert layout.recurrent == [i for i in range(64) if i % 4 != 3]
    assert {layout.held_bytes(i, 131072) for i in layout.recurrent} == {4 * 48 * 128 * 128 + 2 * 3 * 10240 * 2}


def test_heads_are_as_large_as_the_published_ones():
    """Qwen3.6-27B: 425 million weights. By hand of the 35B: a layer of 256 experts, and a product of 4,096 x 2,048."""
    dense, sparse = (shape_of_known(find_known(name)) for name in ("qwen3.6-27b", "qwen3.6-35b-a3b"))
    assert round(dense.mtp_head.weights.parameters / 1e6) == 425
    experts, layer = sparse.weights.experts / 2, sparse.weights.layer_parameters
    assert sparse.mtp_head.weights.parameters == pytest.approx(experts + layer + 4096 * 2048, rel=0.02)
    assert sparse.mtp_head.weights.total == 2 * sparse.mtp_head.weights.parameters
    assert shape_of_known(find_known("qwen3-8b")).mtp_head is None


def test_files_that_hold_packed_weights():
    """gpt-oss-20b: 13,761,264,768 bytes, as the index of its files says. Written out, it is three times that."""
    shape = shape_of_known(find_known("gpt-oss-20b"))
    packed = shape.packed_as_in_files()
    assert (shape.packed, packed.weights.total) == ("mxfp4", 13_761_264_768)
    assert packed.weights.parameters == shape.weights.parameters
    assert packed.weights.experts < 0.27 * shape.weights.experts
    assert shape_of_known(find_known("qwen3-8b")).packed is None


def test_every_model_is_found_by_all_its_names():
    for model in MODELS:
        for name in (model.name, model.name.upper(), model.title, *model.ids, *(i.split("/")[1] for i in model.ids)):
            assert find_known(name) is model


def test_names_are_what_people_type():
    names = [model.name for model in MODELS]
    assert len(set(names)) == len(names)
    assert all(name == name.lower() and "/" not in name for name in names)
    assert {"smollm2", "llama-3.1-8b", "qwen2.5-7b-1m"} <= set(names)


@pytest.mark.parametrize(
    ("text", "repository"),
    [
        ("llama-3.1-8b", "meta-llama/Llama-3.1-8B-Instruct"),
        ("Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("gemma-3-4b", "google/gemma-3-4b-it"),
        ("gemma-3-4b-pt", "google/gemma-3-4b-pt"),
        ("qwen3-8b", "Qwen/Qwen3-8B"),
    ],
)
def test_a_name_means_the_first_hub_id_and_a_hub_id_itself(text, repository):
    assert hub_id(find_known(text), text) == repository


def test_another_owners_model_of_that_name_is_not_the_tables():
    """It may be another model: it must not be loaded or planned as this one."""
    assert find_known("somebody/Qwen3-8B") is None
    assert find_known("Qwen/qwen3-8b") is not None


def test_the_nearest_names():
    assert nearest("lama-3.1-8b").startswith("nearest are llama-3.1-8b")
    assert nearest("xyzzy") == "`offload-triforce models` shows those that are known"


def test_a_plain_configuration_reads_as_transformers_own():
    config = PlainConfig({"a": 1, "text_config": {"b": 2}})
    assert (config.a, config.get_text_config().b) == (1, 2)
    assert getattr(config, "c", None) is None
    assert not config.is_encoder_decoder
