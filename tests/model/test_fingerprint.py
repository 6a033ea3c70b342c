"""The identity of a model: the same in every process and after every run, and another one after every change."""

import copy
import importlib.util
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch

from offload_triforce import TriForce
from offload_triforce.model.fingerprint import LENGTH, RUNS, hash_of_tokenizer, identify, sample_of
from offload_triforce.model.loader import load_model
from offload_triforce.model.packed_head import pack_head
from offload_triforce.model.quantize import pack
from tests.byte_tokenizer import byte_tokenizer, save_tiny_llama
from tests.tiny import FAMILIES, tiny_model
from tests.tiny_gguf import save_tiny_gguf

HASHES = ("configuration", "weights", "tokenizer")


def hashes(identity):
    return [getattr(identity, name) for name in HASHES]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_of_every_family_and_not_changed_by_running(family):
    model = tiny_model(family)
    before = identify(model)
    with torch.no_grad():
        model(torch.randint(3, 100, (1, 200)))  # longrope takes its long frequencies, and keeps them
    assert identify(model) == before
    other = tiny_model(family, seed=1)
    assert identify(other).configuration == before.configuration
    assert "other weights" in before.difference(identify(other))


def test_in_another_process(tmp_path):
    folder = save_tiny_llama(tmp_path / "model")
    here = identify(*load_model(str(folder), torch.float32, torch.device("cpu")))
    code = (
        "import torch\nfrom offload_triforce.model.loader import load_model\n"
        "from offload_triforce.model.fingerprint import identify\n"
        f"found = identify(*load_model({str(folder)!r}, torch.float32, torch.device('cpu')))\n"
        "print(found.configuration, found.weights, found.tokenizer)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == hashes(here), done.stderr


def test_wherever_it_was_loaded_from(tmp_path):
    """A copy in another folder is the same model."""
    one, other = (load_model(str(save_tiny_llama(tmp_path / n)), torch.float32, torch.device("cpu")) for n in "ab")
    assert identify(*one) == identify(*other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_gguf(tmp_path, dtype):
    path = str(save_tiny_gguf(tmp_path / "m.gguf"))
    one, other = (load_model(path, dtype, torch.device("cpu")) for _ in range(2))
    assert identify(*one) == identify(*other)


def test_not_changed_by_an_engine():
    model = tiny_model("qwen2-sliding")
    before = identify(model)
    with TriForce(model, budget=128, tile=64, draft_cache=64) as engine:
        engine.generate(list(range(3, 90)), max_new_tokens=8)
        assert identify(model) == before


def test_embeddings_in_host_memory_are_the_same_model():
    model = tiny_model("llama", tie_word_embeddings=False)
    before = identify(model)
    TriForce(model, embeddings="host")
    assert type(model.get_input_embeddings()).__name__ == "HostEmbedding"
    assert identify(model) == before


def test_every_weight_counts():
    """One number in a sampled place is enough."""
    model = tiny_model("qwen3-next")
    before = identify(model)
    names = [name for name, _ in model.named_parameters()]
    assert len(names) > 40
    for name in names:
        weight = model.get_parameter(name)
        kept = weight.data.clone()
        weight.data.view(-1)[-1] += 1
        assert identify(model).weights != before.weights, name
        weight.data = kept
    assert identify(model) == before


@pytest.mark.parametrize("change", [{"rope_theta": 5000.0}, {"rms_norm_eps": 1e-4}, {"max_position_embeddings": 1024}])
def test_every_setting_counts(change):
    model = tiny_model("llama")
    other = copy.deepcopy(model)
    for name, value in change.items():
        setattr(other.config, name, value)
    assert identify(model).difference(identify(other)) == "another configuration"


def test_settings_that_are_not_set_or_of_no_account_do_not():
    """A newer transformers adds some; a model that was moved names another folder."""
    model = tiny_model("llama")
    other = copy.deepcopy(model)
    other.config.new_feature, other.config.new_list, other.config.new_choice = False, [], None
    other.config._name_or_path, other.config.transformers_version = "elsewhere", "9.9"
    assert identify(model) == identify(other)
    other.config.new_number = 0
    assert identify(model) != identify(other)


def test_dtype_counts():
    assert identify(tiny_model("llama")).weights != identify(tiny_model("llama").to(torch.bfloat16)).weights


def test_a_tokenizer_counts_where_both_are_known():
    model, one, other = tiny_model("llama"), byte_tokenizer(), byte_tokenizer()
    assert hash_of_tokenizer(one) == hash_of_tokenizer(other)
    one(["a", "bc"], padding=True, truncation=True, max_length=1)  # as it was before, whatever it was asked
    assert hash_of_tokenizer(one) == hash_of_tokenizer(other)
    other.add_tokens(["<word>"])
    known, changed, none = identify(model, one), identify(model, other), identify(model)
    assert "tokenizer" in known.difference(changed)
    assert known.difference(none) is none.difference(known) is None
    assert known.difference(replace(known, name="called otherwise")) is None


def test_samples():
    assert sample_of(torch.arange(7)).tolist() == list(range(7))
    large = torch.arange(100_003).view(1, -1)
    sample = sample_of(large)
    assert len(sample) == RUNS * LENGTH
    assert (int(sample[0]), int(sample[-1])) == (0, 100_002)
    matrix = torch.arange(300 * 200).view(300, 200)
    assert torch.equal(sample_of(matrix.t()), sample_of(matrix.t().contiguous()))  # as it is read, not as it lies
    assert sample_of(torch.tensor(5)).tolist() == [5]
    assert sample_of(torch.empty(0, 3)).tolist() == []


def test_a_packed_head():
    models = [tiny_model("llama", tie_word_embeddings=False) for _ in range(3)]
    for model in models[:2]:
        pack_head(model, torch.device("cpu"))
    one, other, plain = map(identify, models)
    assert one == other
    assert one.difference(plain)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("kind", ["nf4", "nf4-nested", "int8"])
def test_packed_weights_are_not_changed_by_their_first_step(kind):
    """Which puts them in another order on processors with bfloat16 products."""
    from transformers import BitsAndBytesConfig

    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": kind == "nf4-nested"}
    packing = BitsAndBytesConfig(load_in_8bit=True) if kind == "int8" else BitsAndBytesConfig(**four)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    models = [tiny_model("llama", seed=seed, head_dim=32, **sizes).to(torch.bfloat16) for seed in (0, 0, 1)]
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model in models:
            pack(model, packing, torch.device("cpu"))
            found.append(identify(model))
        assert found[0] == found[1]
        assert found[0].difference(found[2])
        with torch.no_grad():
            first = models[0](torch.arange(3, 90)[None]).logits
        assert identify(models[0]) == found[0]
        with torch.no_grad():
            assert torch.equal(models[0](torch.arange(3, 90)[None]).logits, first)  # nothing was unpacked to look at it
