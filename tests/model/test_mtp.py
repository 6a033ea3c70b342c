"""Finding and loading a checkpoint's MTP head, and the sentences where there is none."""

from __future__ import annotations

import json
import threading

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import modeling_layers

from offload_triforce import InputError, TriForce, UnsupportedModelError
from offload_triforce.model.attach import attached
from offload_triforce.model.mtp_files import check_head, load_head
from tests.byte_tokenizer import byte_tokenizer
from tests.mtp import head_weights, load, needs_heads, save_with_head
from tests.tiny import prompt_ids, tiny_model
from tests.tiny_gguf import save_tiny_gguf

REST = r"[;,] .*draft 'ngram' \(look-up in the text\)$"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_with_head(tmp_path_factory.mktemp("head"))


@needs_heads
def test_a_head_is_read_and_the_model_stays_as_it_is(folder):
    model = load(folder)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    configured = model.config.to_dict()
    head = load_head(model)
    stored = head_weights(load_file(folder / "model.safetensors"))
    read = dict(head.module.layers.named_parameters())
    assert len(read) == len(stored)
    for weight in read.values():
        assert any(weight.shape == other.shape and torch.equal(weight, other) for other in stored.values())
    assert torch.equal(read["0.eh_proj.weight"], stored["mtp.fc.weight"])
    assert torch.equal(read["0.hnorm.weight"], stored["mtp.pre_fc_norm_hidden.weight"])
    assert model.config.to_dict() == configured
    assert "_keys_to_ignore_on_load_unexpected" not in vars(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert load_head(model).module is head.module, "read once for all engines of a model"


@needs_heads
def test_shards_and_a_tower_beside_it(folder, tmp_path):
    """Files in several parts; the weights of an image tower are no part of the head."""
    weights = load_file(folder / "model.safetensors") | {"model.visual.blocks.0.weight": torch.ones(3)}
    names = sorted(weights)
    parts = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, own in parts.items():
        save_file({name: weights[name].contiguous() for name in own}, tmp_path / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, own in parts.items() for name in own}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    whole, sharded = load_head(load(folder)).module, load_head(load(tmp_path)).module
    for one, other in zip(whole.layers.parameters(), sharded.layers.parameters(), strict=True):
        assert torch.equal(one, other)


def refused(call, kind, words):
    with pytest.raises(kind, match=words + REST):
        call()


@needs_heads
@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("llama", "LlamaForCausalLM has no MTP head that its configuration tells of"),
        ("qwen3.5", "Qwen3_5ForCausalLM has no MTP head that its configuration tells of"),
    ],
)
def test_models_without_a_head(family, words):
    refused(lambda: TriForce(tiny_model(family), draft="mtp"), UnsupportedModelError, words)


@needs_heads
def test_a_head_of_several_layers(folder):
    model = load(folder)
    model.config.mtp_num_hidden_layers = 3
    refused(lambda: load_head(model), UnsupportedModelError, "has 3 layers; only one layer, .* is supported")


@needs_heads
def test_a_model_that_comes_from_nowhere():
    model = tiny_model("qwen3.5", mtp_num_hidden_layers=1, layer_types=["linear_attention", "full_attention"] * 2)
    refused(lambda: load_head(model), InputError, "a model that was not loaded from files brings no MTP head along")


@needs_heads
def test_a_last_layer_whose_norms_are_others():
    model = tiny_model("qwen3.5", mtp_num_hidden_layers=1)
    words = "transformers cannot make the MTP head .* a Qwen3_5RMSNormGated, and its decoder ends with a Qwen3_5RMSNorm"
    refused(lambda: load_head(model), UnsupportedModelError, words)


def without(folder, target, drop=lambda name: False, **more):
    """A copy of a checkpoint without some of its weights, and with others."""
    weights = {name: part for name, part in load_file(folder / "model.safetensors").items() if not drop(name)}
    save_file({**weights, **more}, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((folder / "config.json").read_text())
    byte_tokenizer().save_pretrained(target)
    return target


@needs_heads
def test_a_checkpoint_without_its_head(folder, tmp_path):
    """Said before the weights are read, and after."""
    source = without(folder, tmp_path, lambda name: name.startswith("mtp."))
    words = "hold no weights of an MTP head, though its configuration tells of one; get a checkpoint that has them"
    refused(lambda: check_head(str(source)), InputError, words)
    refused(lambda: load_head(load(source)), InputError, words)
    refused(lambda: TriForce.load(str(source), draft="mtp+ngram", device="cpu"), InputError, words)


@needs_heads
def test_a_checkpoint_with_half_a_head(folder, tmp_path):
    source = without(folder, tmp_path, lambda name: name.startswith("mtp.layers.0.mlp"))
    words = r"could not be loaded: The following MtpModel weights are missing .*; get the files again"
    refused(lambda: load_head(load(source)), InputError, words)


@needs_heads
def test_a_head_of_other_sizes(folder, tmp_path):
    source = without(folder, tmp_path, lambda name: name == "mtp.fc.weight", **{"mtp.fc.weight": torch.zeros(48, 48)})
    refused(
        lambda: load_head(load(source)), InputError, "get the files again|get configuration and weights from one place"
    )


@needs_heads
def test_a_quantised_head(folder, tmp_path):
    packed = {"mtp.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1)}
    source = without(folder, tmp_path, **packed)
    words = r"is quantised \(mtp.layers.0.mlp.up_proj.weight_scale_inv\), and only one in 16 or 32 bits can be read"
    refused(lambda: check_head(str(source)), InputError, words)


@needs_heads
def test_a_gguf_file(tmp_path):
    file = tmp_path / "m.gguf"
    save_tiny_gguf(file)
    refused(lambda: check_head(str(file)), InputError, "m.gguf is a GGUF file, of which transformers reads no MTP head")
    refused(lambda: TriForce.load(str(file), draft="mtp", device="cpu"), InputError, "is a GGUF file")


@pytest.mark.parametrize("kind", ["none", "older"])
def test_a_release_without_heads(monkeypatch, kind):
    class Older:
        pass

    monkeypatch.setattr(modeling_layers, "MtpModel", None if kind == "none" else Older, raising=False)
    words = rf"transformers {transformers.__version__} does not read MTP heads; install transformers 5.24 or later"
    model = tiny_model("qwen3.5", mtp_num_hidden_layers=1)
    refused(lambda: load_head(model), UnsupportedModelError, words)
    with TriForce(model, budget=128) as engine:
        assert engine.generate(prompt_ids(40), max_new_tokens=4, do_sample=False).stats.new_tokens == 4


def test_auto_is_look_up_where_there_is_no_head(recwarn):
    with TriForce(tiny_model("llama")) as engine:
        assert engine._drafters.lookup
        assert engine._drafters.head is engine._drafters.model is None
    assert not recwarn.list


@needs_heads
def test_auto_takes_the_head(folder, tmp_path):
    model = load(folder)
    with TriForce(model) as engine:
        assert engine._drafters.lookup
        assert engine._drafters.head is not None
    for changes in ({"gamma": 0}, {"gamma1": 0}, {"draft_cache": 12}):
        with TriForce(model, **changes) as engine:
            assert engine._drafters.head is None
    broken = without(folder, tmp_path, lambda name: name.startswith("mtp.layers.0.mlp"))
    with TriForce(load(broken)) as engine:
        assert engine._drafters.head is None


@needs_heads
def test_loading_waits_for_nobody(folder, monkeypatch):
    """A thread in a step of the model may load its head, while another is about to."""
    model = load(folder)
    load_head(model)
    held, done = threading.Event(), threading.Event()

    def other():
        held.wait(10)
        load_head(model)
        done.set()

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    with attached(model):
        held.set()
        load_head(model)
    assert done.wait(10)
