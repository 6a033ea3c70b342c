"""Checkpoints whose weights are packed in their files: loaded as transformers loads them, or refused before."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from offload_triforce import InputError, MemoryLimitError, TriForce, TriForceError, UnsupportedModelError
from offload_triforce.machine.cards import find_card
from offload_triforce.machine.hardware import of_card
from offload_triforce.model.layout import probe
from offload_triforce.model.loader import load_model
from offload_triforce.model.multimodal import loading_options
from offload_triforce.model.prequantized import check_packed, stays_packed
from offload_triforce.model.shape import shape_of_loaded
from offload_triforce.model.weights import count
from offload_triforce.planner.models import find_shape, on_card
from tests.byte_tokenizer import byte_tokenizer, save_tiny_llama
from tests.model.test_multimodal import KINDS, SMALL, WORDS, answer
from tests.packed import compute_in_their_dtype
from tests.packed_checkpoints import FORMATS, describe, pack_compressed, pack_fp8, pack_nf4, pack_torchao
from tests.tiny import greedy, prompt_ids, tiny_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("plain") / "tiny", eos_token_id=None)


@pytest.fixture
def nothing_is_read(monkeypatch):
    def read(*_, **__):
        raise AssertionError("weights are read")

    monkeypatch.setattr("offload_triforce.model.loader.AutoModelForCausalLM.from_pretrained", read)
    monkeypatch.setattr("offload_triforce.model.loader.AutoTokenizer.from_pretrained", read)


def packed_folder(plain, folder, kind):
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
        pack_nf4(plain, folder)
    elif kind in FORMATS:
        pytest.importorskip("compressed_tensors")
        pack_compressed(plain, folder, kind)
    elif kind.endswith("Config"):
        pytest.importorskip("torchao")
        pack_torchao(plain, folder, kind)
    else:
        pack_fp8(plain, folder)
    return folder


@pytest.mark.parametrize("kind", ["fp8", "nf4", "int4", "int8", "Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_says_what_transformers_says(kind, plain, tmp_path, monkeypatch):
    if kind == "nf4":
        compute_in_their_dtype(monkeypatch)
    folder = packed_folder(plain, tmp_path / kind, kind)
    with TriForce.load(str(folder), draft="self", dtype="float32", device="cpu", **SMALL) as engine:
        found = engine.generate(prompt_ids(100), max_new_tokens=60, do_sample=False).token_ids
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map={"": "cpu"})
    assert found == greedy(theirs, prompt_ids(100), 60)
    assert len(set(found)) > 5
    same = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    assert found != greedy(same, prompt_ids(100), 60), "packing changes nothing: this proves nothing"


@pytest.mark.parametrize("kind", ["W8A8", "FP8", "Int8DynamicActivationInt8WeightConfig"])
def test_where_what_goes_into_a_layer_is_rounded_too(kind, plain, tmp_path):
    """To 8 bits, where the last bit of a sum decides: transformers' own ways with and without a cache part, too. Every
    token is the best one or as good as that, by what transformers makes of the text before it.
    """
    folder = packed_folder(plain, tmp_path / kind, kind)
    with TriForce.load(str(folder), draft="self", dtype="float32", device="cpu", **SMALL) as engine:
        result = engine.generate(prompt_ids(100), max_new_tokens=60, do_sample=False)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map={"": "cpu"})
    text = torch.tensor([[*prompt_ids(100)[0].tolist(), *result.token_ids]])
    with torch.no_grad():
        logits = theirs(text).logits[0, 99:-1]
    behind = logits.amax(-1) - logits[range(60), result.token_ids]
    assert (behind / logits.std(-1)).max() < 0.1
    assert len(set(result.token_ids)) > 5


@pytest.mark.parametrize("kind", ["qwen3_5", "mistral3"])
def test_text_decoder_of_a_packed_model_that_sees(kind, tmp_path):
    """Names of modules that stay as they are have the prefixes of the whole model."""
    changes, loaded = KINDS[kind]
    if not hasattr(transformers, loaded):
        pytest.skip(f"transformers {transformers.__version__} has no {loaded}")
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **changes)).eval()
    whole.save_pretrained(tmp_path / "plain")
    names = [name.removesuffix(".weight") for name in load_file(tmp_path / "plain" / "model.safetensors")]
    kept = tuple(name for name in names if name.endswith(("layers.1.mlp.up_proj", "layers.0.mlp.down_proj")))
    unpacked = pack_fp8(tmp_path / "plain", tmp_path / "packed", kept)
    assert len(kept) == 2
    byte_tokenizer().save_pretrained(tmp_path / "packed")
    with TriForce.load(str(tmp_path / "packed"), draft="self", dtype="float32", device="cpu", **SMALL) as engine:
        assert type(engine.model).__name__ == loaded
        result = engine.generate(WORDS, max_new_tokens=24, do_sample=False)
    save_file(unpacked, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "plain")
    assert result.token_ids == answer(whole, torch.tensor([result.prompt_ids]))
    assert len(set(result.token_ids)) > 3


def test_modules_that_stay_as_they_are_by_the_names_of_the_whole_model(tmp_path):
    """compressed-tensors packs by name what is not named."""
    pytest.importorskip("compressed_tensors")
    torch.manual_seed(0)
    config = AutoConfig.for_model("mistral3", **KINDS["mistral3"][0])
    whole = AutoModelForImageTextToText.from_config(config).eval()
    whole.save_pretrained(tmp_path / "whole")
    text = AutoModelForCausalLM.from_config(config.get_text_config())
    text.load_state_dict(
        {
            name.replace("model.language_model.", "model."): weight
            for name, weight in whole.state_dict().items()
            if "language_model" in name or "lm_head" in name
        }
    )
    text.save_pretrained(tmp_path / "text")
    pack_compressed(tmp_path / "text", tmp_path / "packed", keep="model.layers.1.mlp.up_proj")
    packing = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert sorted(packing["ignore"]) == ["lm_head", "model.layers.1.mlp.up_proj"]
    packing["ignore"] = [f"language_model.{name}" for name in packing["ignore"]]
    weights = load_file(tmp_path / "packed" / "model.safetensors")
    byte_tokenizer().save_pretrained(tmp_path / "whole")
    describe(tmp_path / "whole", **packing)
    named = {f"language_model.{name}": weight for name, weight in weights.items()}
    save_file(named, tmp_path / "whole" / "model.safetensors", {"format": "pt"})
    with TriForce.load(str(tmp_path / "whole"), draft="self", dtype="float32", device="cpu", **SMALL) as engine:
        found = engine.generate(prompt_ids(50), max_new_tokens=24, do_sample=False).token_ids
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert found == greedy(theirs, prompt_ids(50), 24)
    assert found != greedy(text, prompt_ids(50), 24)


@pytest.mark.parametrize("kind", ["qwen3_5", "gemma4"])
def test_transformers_is_told_the_names_of_the_text_decoder(kind):
    config = AutoConfig.for_model(kind, **KINDS[kind][0])
    assert loading_options(config).get("config", config).to_dict().get("quantization_config") is None
    kept = ["lm_head", "model.language_model.layers.0.mlp.up_proj", "model.visual"]
    config.quantization_config = {"quant_method": "fp8", "modules_to_not_convert": kept}
    told = loading_options(config)["config"].quantization_config["modules_to_not_convert"]
    assert told == [*kept, "model.layers.0.mlp.up_proj"]
    assert config.quantization_config["modules_to_not_convert"] == kept


METHODS = sorted({*AUTO_QUANTIZER_MAPPING, "bitsandbytes", "of-tomorrow"})


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_taken_or_refused_in_one_sentence(method):
    """With a description that need not be whole: whatever a quantiser makes of that is no traceback either."""
    config = LlamaConfig()
    config.quantization_config = {"quant_method": method, "bits": 4}
    if method.startswith("bitsandbytes_"):
        config.quantization_config = {"quant_method": "bitsandbytes", f"load_in_{method[13:]}": True}
    packed, refused = None, None
    try:
        packed = check_packed(config, "a/model", CPU)
    except TriForceError as error:
        refused = error
    assert isinstance(refused, UnsupportedModelError) == (method == "of-tomorrow")
    if refused is None:
        assert packed.method == method
        return
    said = str(refused)
    assert "a/model" in said
    assert method in said
    assert "\n" not in said
    assert len(said) < 700


def test_what_is_missing_is_said_before_anything_is_read(plain, tmp_path, monkeypatch, nothing_is_read):
    pack_fp8(plain, tmp_path / "packed")
    describe(tmp_path / "packed", quant_method="awq", bits=4)
    monkeypatch.setattr("transformers.quantizers.quantizer_awq.is_gptqmodel_available", lambda: False)
    with pytest.raises(InputError, match=r"are packed \(awq\), and cannot be read here: .*; pip install gptqmodel$"):
        load_model(str(tmp_path / "packed"), torch.float32, CPU)
    describe(tmp_path / "packed", quant_method="of-tomorrow")
    with pytest.raises(UnsupportedModelError, match=r"packed by 'of-tomorrow', which transformers .* it knows .*awq"):
        load_model(str(tmp_path / "packed"), torch.float32, CPU)


def test_a_package_that_is_not_there_has_a_name(plain, tmp_path, monkeypatch, nothing_is_read):
    def missing(*_, **__):
        raise ModuleNotFoundError("No module named 'compressed_tensors'", name="compressed_tensors.quantization")

    monkeypatch.setattr("transformers.quantizers.auto.AutoHfQuantizer.from_config", missing)
    pack_fp8(plain, tmp_path / "packed")
    with pytest.raises(InputError, match=r"pip install 'compressed-tensors>=0.15'$"):
        load_model(str(tmp_path / "packed"), torch.float32, CPU)


def test_the_products_of_fp8_are_asked_for_on_a_card(plain, tmp_path, monkeypatch):
    """transformers looks for them in the first step only. Nothing here touches the card."""
    pack_fp8(plain, tmp_path / "packed")
    config = AutoConfig.from_pretrained(tmp_path / "packed")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    card, there = torch.device("cuda"), [(8, 9)]
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: there[0])
    for installed in (False, True):
        monkeypatch.setattr("offload_triforce.model.prequantized.is_kernels_available", lambda: installed)  # noqa: B023
        if installed:
            assert not check_packed(config, "a/model", card).unpacked
        else:
            with pytest.raises(InputError, match=r"pip install kernels$"):
                check_packed(config, "a/model", card)
    there[0] = (8, 6)
    assert check_packed(config, "a/model", card).unpacked
    assert config.quantization_config.get("dequantize") is None, "that is found out anew on loading"


@pytest.mark.parametrize(
    ("how", "option"), [({"quantize": "nf4"}, "--quantize nf4"), ({"quantize_head": "int8"}, "head")]
)
def test_packed_weights_are_not_packed_again(how, option, plain, tmp_path, nothing_is_read):
    pytest.importorskip("bitsandbytes")
    folder = packed_folder(plain, tmp_path / "packed", "fp8")
    with pytest.raises(InputError, match=rf"packed already \(fp8\); leave .*{option}"):
        load_model(str(folder), torch.float32, CPU, **how)
    with pytest.raises(InputError, match=rf"packed already \(fp8\); leave .*{option}"):
        find_shape(str(folder)).quantized(how.get("quantize"), how.get("quantize_head"))


def test_what_is_written_out_has_to_fit(plain, tmp_path, monkeypatch, nothing_is_read):
    folder = packed_folder(plain, tmp_path / "packed", "fp8")
    size = count(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(plain))).weights(4, None).total
    monkeypatch.setattr("offload_triforce.model.prequantized.free_on_host", lambda: size - 1)
    with pytest.raises(MemoryLimitError, match=r"\(fp8\) out in float32 on this machine: .*--quantize nf4"):
        load_model(str(folder), torch.float32, CPU)
    monkeypatch.setattr("offload_triforce.model.prequantized.free_on_host", lambda: size)
    with pytest.raises(InputError, match="weights are read"):
        load_model(str(folder), torch.float32, CPU)


def test_plans_with_the_bytes_of_the_files(plain, tmp_path):
    """Where they stay packed; an older card has FP8 written out."""
    folder = packed_folder(plain, tmp_path / "packed", "fp8")
    weights = load_file(folder / "model.safetensors")
    held = sum(weight.nbytes for weight in weights.values())
    shape = find_shape(str(folder), torch.float32)
    packed = on_card(shape, of_card(find_card("RTX 4090")))
    assert packed.is_packed
    assert packed.weights.total == held
    assert packed.weights.parameters == shape.weights.parameters
    assert packed.quantized(None).weights == packed.weights
    older = on_card(shape, of_card(find_card("RTX 3090")))
    assert not older.is_packed
    assert older.weights.total == 4 * older.weights.parameters > held
    alone = find_shape(str(folder / "config.json"), torch.float32)
    assert alone.packed == "fp8"
    assert on_card(alone, of_card(find_card("RTX 4090"))).weights == older.weights
    half = on_card(find_shape(str(folder), torch.bfloat16), of_card(find_card("RTX 4090")))
    plain_ones = sum(w.nbytes for name, w in weights.items() if name.endswith("weight") and w.dtype == torch.float32)
    assert half.weights.total == held - plain_ones // 2


def test_only_what_is_loaded_of_the_files_counts(plain, tmp_path):
    """Not what belongs to eyes, nor to an MTP head in front of or behind the layers."""
    folder = packed_folder(plain, tmp_path / "packed", "fp8")
    before = on_card(find_shape(str(folder)), of_card(find_card("RTX 4090"))).weights
    weights = load_file(folder / "model.safetensors")
    more = {"model.visual.blocks.0.attn.qkv.weight": 9, "mtp.layers.0.mlp.up_proj.weight": 8}
    more |= {"model.layers.2.mlp.up_proj.weight": 7, "vision_tower.embeddings.weight": 6}
    save_file(weights | {name: torch.zeros(size) for name, size in more.items()}, folder / "model.safetensors")
    assert on_card(find_shape(str(folder)), of_card(find_card("RTX 4090"))).weights == before


def test_counts_of_a_loaded_model_are_what_its_files_hold(plain, tmp_path):
    folder = packed_folder(plain, tmp_path / "nf4", "nf4")
    planned = on_card(find_shape(str(folder), torch.float32), of_card(find_card("RTX 4090")))
    model, _ = load_model(str(folder), torch.float32, CPU)
    loaded = shape_of_loaded(model, probe(model))
    assert loaded.quantize == "nf4"
    assert planned.weights.parameters == loaded.weights.parameters
    assert planned.weights.total == pytest.approx(loaded.weights.total, rel=0.1)  # its scales are in 8 bits


class Codes(nn.Module):
    """A linear layer as AWQ and GPTQ pack them: 4 bits in int32 buffers, 16-bit scales."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", torch.zeros(linear.in_features // 8, linear.out_features, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(1, linear.out_features, dtype=torch.float16))


def test_weights_in_buffers_are_counted():
    model = tiny_model("llama")
    before = count(model).weights(4, None)
    saved = 0
    for layer in model.model.layers:
        linear = layer.mlp.up_proj
        layer.mlp.up_proj = Codes(linear)
        saved += linear.weight.nbytes - linear.weight.nbytes // 8 - 2 * linear.out_features
    after = count(model).weights(4, None)
    assert after.parameters == before.parameters
    assert after.total == before.total - saved
    assert after.layer < before.layer
    model.lm_head = Codes(model.lm_head)
    assert count(model).head_rows == 101


@pytest.mark.parametrize(
    ("method", "cc", "stays"),
    [("fp8", 86, False), ("fp8", 89, True), ("mxfp4", 86, True), ("awq", 75, True), ("compressed-tensors", 120, False)],
)
def test_where_weights_stay_packed(method, cc, stays):
    assert stays_packed(method, cc) == stays


def test_names_of_methods_are_transformers_own(plain, tmp_path):
    folder = packed_folder(plain, tmp_path / "packed", "fp8")
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"
    assert {"fp8", "mxfp4", "awq", "compressed-tensors"} <= set(AUTO_QUANTIZER_MAPPING)
