"""The output head in 8 bits: the model that is loaded so is the model, at all levels, and in the plan."""

import pytest
import torch
import transformers

from offload_triforce import InputError, MemoryLimitError, TriForce
from offload_triforce.model import loader
from offload_triforce.model.counts import nf4_bytes
from offload_triforce.model.gguf_header import read_header
from offload_triforce.model.layout import probe
from offload_triforce.model.loader import load_model
from offload_triforce.model.packed_head import Int8Head, pack_head
from offload_triforce.model.shape import shape_of_loaded
from offload_triforce.model.weights import packing_of
from offload_triforce.planner.models import find_shape
from tests.byte_tokenizer import save_tiny_llama
from tests.packed import bytes_taken, compute_in_their_dtype
from tests.tiny import greedy, prompt_ids, tiny_model
from tests.tiny_gguf import save_tiny_gguf
from tests.usual import sampled

CPU = torch.device("cpu")
SMALL = {"budget": 64, "chunk": 4, "sink": 4, "recent": 16, "tile": 16, "gamma": 4}


@pytest.fixture(scope="module", params=["folder", "gguf"])
def source(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return str(save_tiny_llama(folder) if request.param == "folder" else save_tiny_gguf(folder / "tiny.gguf"))


@pytest.mark.parametrize(("quantize", "draft"), sampled([None, "nf4"], ["ngram", "self"], share=2))
def test_greedy_tokens_are_the_models_own(source, quantize, draft, monkeypatch):
    """And drawn ones those of plain decoding with the same seed: one head for all levels."""
    pytest.importorskip("bitsandbytes")
    compute_in_their_dtype(monkeypatch)
    loaded = {"dtype": "float32", "device": "cpu", "quantize": quantize, "quantize_head": "int8"}
    with TriForce.load(source, draft=draft, **loaded, **SMALL, draft_cache=32) as engine:
        assert isinstance(engine.model.get_output_embeddings(), Int8Head)
        assert packing_of(engine.model) == (quantize, "int8")
        prompt = prompt_ids(100)
        result = engine.generate(prompt, max_new_tokens=30, do_sample=False)
        assert result.token_ids == greedy(engine.model, prompt, 30)
        drawn = engine.generate(prompt, max_new_tokens=30, do_sample=True, temperature=1.5, seed=3).token_ids
        with TriForce(engine.model, engine.tokenizer, "none", **SMALL | {"gamma": 0}) as plain:
            assert drawn == plain.generate(prompt, max_new_tokens=30, do_sample=True, temperature=1.5, seed=3).token_ids
        assert len(set(drawn)) > 10


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_planned_bytes_are_those_that_are_taken(source, quantize):
    pytest.importorskip("bitsandbytes")
    model, _ = load_model(source, torch.bfloat16, CPU, quantize, "int8")
    planned = find_shape(source).quantized(quantize, "int8").weights
    assert planned.total == pytest.approx(bytes_taken(model), rel=0.01)
    head = model.get_output_embeddings()
    assert planned.head == head.weight.nbytes + head.scale.nbytes
    assert shape_of_loaded(model, probe(model)).weights == planned


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_the_whole_head_never_lies_on_the_device(quantize, tmp_path, monkeypatch):
    """It waits in host memory. The two devices here are one, by two names, of which the first stands for a card."""
    pytest.importorskip("bitsandbytes")
    folder, card, asked = str(save_tiny_llama(tmp_path)), torch.device("cpu", 0), []
    real = loader.AutoModelForCausalLM.from_pretrained

    def load(*args, **options):
        asked.append(options["device_map"])
        return real(*args, **options)

    monkeypatch.setattr(loader.AutoModelForCausalLM, "from_pretrained", load)
    before = transformers.modeling_utils.accelerate_dispatch
    model, _ = load_model(folder, torch.float32, card, quantize, "int8")
    assert asked == [{"": card, "lm_head": CPU}]
    assert not any(hasattr(part, "_hf_hook") for part in model.modules())
    assert transformers.modeling_utils.accelerate_dispatch is before
    assert packing_of(model) == (quantize, "int8")
    expected, _ = load_model(folder, torch.float32, CPU, quantize, "int8")
    ids = prompt_ids(20)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("biased", [False, True])
def test_codes_are_as_near_as_they_can_be(biased, monkeypatch):
    """Half a step of each row's own scale, whatever the rows that are packed at a time; a row of zeros stays one."""
    monkeypatch.setattr("offload_triforce.model.packed_head.ROWS", 7)
    model = tiny_model(tie_word_embeddings=False)
    if biased:
        model.get_output_embeddings().bias = torch.nn.Parameter(torch.randn(model.config.vocab_size))
    weight = model.get_output_embeddings().weight
    with torch.no_grad():
        weight[3] = 0.0
    bias, weight = model.get_output_embeddings().bias, weight.detach().clone()
    pack_head(model, CPU)
    head = model.get_output_embeddings()
    unpacked = head.weight * head.scale[:, None]
    assert ((unpacked - weight).abs() <= 0.5001 * head.scale[:, None]).all()
    assert (head.weight.abs().amax(1) == 127).sum() == len(weight) - 1
    assert not head.weight[3].any()
    assert head.scale[3] == 1, "not 0 / 0, of which processors make what they like"
    assert not head.training
    hidden = torch.randn(2, 5, weight.shape[1])
    expected = hidden @ unpacked.T + (0 if bias is None else bias)
    torch.testing.assert_close(head(hidden), expected, rtol=1e-4, atol=1e-4)


def test_a_token_is_scored_alone():
    """What else is in the same step changes nothing: else levels would judge by different models."""
    model = tiny_model(tie_word_embeddings=False)
    pack_head(model, CPU)
    hidden = torch.randn(6, model.config.hidden_size) * torch.tensor([1.0, 100, 1, 1, 1e-3, 1])[:, None]
    together = model.get_output_embeddings()(hidden)
    alone = torch.cat([model.get_output_embeddings()(each[None]) for each in hidden])
    assert ((together - alone).abs() <= 1e-5 * hidden.norm(dim=1, keepdim=True)).all()


def test_a_head_that_is_the_input_embedding_too_is_refused_before_loading(tmp_path, monkeypatch):
    model, tokenizer = load_model(str(save_tiny_llama(tmp_path / "own")), torch.float32, CPU)
    tied = tiny_model(vocab_size=model.config.vocab_size, tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    load_model(str(tmp_path / "tied"), torch.float32, CPU)
    monkeypatch.setattr(loader.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(InputError, match="output head is its input embedding too"):
        TriForce.load(str(tmp_path / "tied"), device="cpu", quantize_head="int8")
    with pytest.raises(InputError, match="output head is its input embedding too"):
        find_shape("qwen3-0.6b").quantized("nf4", "int8")
    with pytest.raises(InputError, match="unknown quantisation 'nf4' of the output head; use int8"):
        TriForce.load(str(tmp_path / "tied"), device="cpu", quantize_head="nf4")


def test_a_gguf_file_without_a_head_of_its_own(tmp_path, monkeypatch):
    """Its header tells, before anything is unpacked."""
    path = save_tiny_gguf(tmp_path / "tiny.gguf")
    header = read_header(path)
    assert header.head == 64 * 261
    assert header.packable == 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 64)
    monkeypatch.setattr(loader, "check_files", lambda *_: header.__class__(**{**vars(header), "head": 0}))
    with pytest.raises(InputError, match="output head is its input embedding too"):
        load_model(str(path), torch.float32, CPU, None, "int8")


def test_what_makes_a_gguf_file_fit_a_card(tmp_path, monkeypatch):
    """The way that changes least, with its size; and where none does, how small the last one is."""
    path = save_tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(loader, "move", lambda *_: pytest.fail("loaded"))
    device, free = torch.device("cuda"), [0]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 0))
    monkeypatch.setattr("offload_triforce.model.quantize.gigabytes", lambda size: f"{size:,} B")
    header = read_header(path)
    kept = header.parameters - header.packable - header.head
    sizes = {  # in 16 bits, and from what changes least on
        "16": 2 * header.parameters,
        "--quantize-head int8": 2 * (kept + header.packable) + header.head,
        "--quantize int8": 2 * (kept + header.head) + header.packable,
        "--quantize int8 --quantize-head int8": 2 * kept + header.head + header.packable,
        "--quantize nf4": 2 * (kept + header.head) + nf4_bytes(header.packable, header.packable // 64),
        "--quantize nf4 --quantize-head int8": 2 * kept
        + header.head
        + nf4_bytes(header.packable, header.packable // 64),
    }
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)

    def refusal(quantize=None, head=None):
        with pytest.raises(MemoryLimitError) as error:
            loader.check_room(path, header, torch.bfloat16, device, quantize, head)
        return str(error.value)

    for way, size in list(sizes.items())[1:]:
        free[0] = size
        assert f"{sizes['16'] - size:,} B too little; {way} packs it to {size:,} B, which fits" in refusal()
    free[0] = size - 1
    assert f"even {way} leaves {size:,} B: take a smaller model" in refusal()
    assert f"and takes {size:,} B when it is packed, but {size - 1:,} B of the card are free, 1 B" in refusal(
        "nf4", "int8"
    )
    free[0] = size
    loader.check_room(path, header, torch.bfloat16, device, "nf4", "int8")
    free[0] = sizes["16"]
    loader.check_room(path, header, torch.bfloat16, device, None)
