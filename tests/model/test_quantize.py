"""A GGUF file packed after unpacking: bit for bit what transformers makes of the same weights in a folder."""

import gc
import weakref

import pytest
import torch

from offload_triforce import MemoryLimitError, TriForce
from offload_triforce.model import loader, quantize
from offload_triforce.model.counts import nf4_bytes
from offload_triforce.model.embeddings import HostEmbedding
from offload_triforce.model.fetch import fetch_model
from offload_triforce.model.gguf_header import read_header
from offload_triforce.model.loader import load_model
from offload_triforce.planner.models import find_shape
from tests.packed import bytes_taken, compute_in_their_dtype
from tests.tiny import greedy, prompt_ids, tiny_model
from tests.tiny_gguf import save_tiny_gguf

pytest.importorskip("bitsandbytes")
CPU = torch.device("cpu")
CLASSES = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    return save_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def folder(gguf, tmp_path_factory):
    """The same weights, unpacked, as transformers saves them."""
    folder = tmp_path_factory.mktemp("unpacked")
    model, tokenizer = load_model(str(gguf), torch.float32, CPU)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def manner(model):
    """How a model's packed layers compute, beside what is in them."""
    said = []
    for part in model.modules():
        if type(part).__name__ == "Linear8bitLt":
            said.append((part.state.threshold, part.state.has_fp16_weights, part.state.use_pool, part.training))
        elif type(part).__name__ == "Linear4bit":
            weight = part.weight
            said.append((part.compute_dtype, weight.quant_type, weight.blocksize, weight.compress_statistics))
    return said


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("how", CLASSES)
def test_the_same_as_a_folder_that_transformers_packs(gguf, folder, how, dtype):
    ours, _ = load_model(str(gguf), dtype, CPU, how)
    theirs, _ = load_model(str(folder), dtype, CPU, how)
    packed = [name for name, part in ours.named_modules() if type(part).__name__ == CLASSES[how]]
    assert len(packed) == 2 * 7
    assert packed == [name for name, part in theirs.named_modules() if type(part).__name__ == CLASSES[how]]
    assert manner(ours) == manner(theirs)
    said, expected = ours.state_dict(), theirs.state_dict()
    assert said.keys() == expected.keys()
    assert all(torch.equal(said[name], expected[name]) for name in expected)
    assert {p.dtype for p in ours.parameters()} == {p.dtype for p in theirs.parameters()}
    ids = prompt_ids(50)
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("how", CLASSES)
def test_decodes_as_transformers_does(gguf, how, monkeypatch):
    """int8 without outliers, whose columns depend on what else is in the same call."""
    compute_in_their_dtype(monkeypatch)
    make = loader._quantization

    def without_outliers(name, dtype):
        config = make(name, dtype)
        config.llm_int8_threshold = 0.0
        return config

    monkeypatch.setattr(loader, "_quantization", without_outliers)
    small = {"budget": 64, "chunk": 4, "sink": 4, "recent": 16, "tile": 16, "gamma": 4}
    with TriForce.load(str(gguf), dtype="float32", device="cpu", quantize=how, **small) as engine:
        prompt = prompt_ids(100)
        result = engine.generate(prompt, max_new_tokens=20, do_sample=False)
        assert result.token_ids == greedy(engine.model, prompt, 20)
        drawn = engine.generate(prompt, max_new_tokens=30, do_sample=True, temperature=1.5, seed=3).token_ids
        with TriForce(engine.model, engine.tokenizer, "none", **small | {"gamma": 0}) as plain:
            assert drawn == plain.generate(prompt, max_new_tokens=30, do_sample=True, temperature=1.5, seed=3).token_ids
        assert len(set(drawn)) > 10


def test_one_layer_is_unpacked_on_the_device_at_a_time(gguf, monkeypatch):
    """Each layer's unpacked weight is given up before the next one is packed: neither side ever holds them twice."""
    unpacked, still_there, pack = [], [], quantize._packed

    def watched(linear, config, device):
        gc.collect()
        still_there.append(sum(weight() is not None for weight in unpacked))
        unpacked.append(weakref.ref(linear.weight))
        return pack(linear, config, device)

    monkeypatch.setattr(quantize, "_packed", watched)
    gc.collect()
    gc.freeze()  # what other tests have left is not looked through again and again
    try:
        load_model(str(gguf), torch.bfloat16, CPU, "nf4")
    finally:
        gc.unfreeze()
    assert len(still_there) == 2 * 7
    assert set(still_there) == {0}


@pytest.mark.parametrize("how", [None, *CLASSES])
def test_planned_bytes_are_those_that_are_taken(gguf, how):
    model, _ = load_model(str(gguf), torch.bfloat16, CPU, how)
    shape = find_shape(str(gguf)).quantized(how)
    assert shape.gguf == gguf
    assert shape.weights.total == pytest.approx(bytes_taken(model), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("how", CLASSES)
def test_smollm2_packed(smollm2, how):
    """A real file: as planned, and near what it was: its first choice stays among the first few."""
    unpacked, tokenizer = smollm2
    model, _ = load_model(fetch_model("smollm2", hub=False), torch.float32, CPU, how)
    assert sum(type(part).__name__ == CLASSES[how] for part in model.modules()) == 30 * 7
    assert find_shape("smollm2", torch.float32).quantized(how).weights.total == pytest.approx(
        bytes_taken(model), rel=1e-4
    )
    ids = tokenizer("The capital of France is Paris, and the capital of Italy is", return_tensors="pt").input_ids
    with torch.no_grad():
        first = unpacked(ids).logits[0, -1].argmax()
        assert first in model(ids).logits[0, -1].topk(5).indices
    with TriForce(model, tokenizer, budget=128) as engine:
        answer = engine.generate("The capital of France is", max_new_tokens=8, do_sample=False)
        assert len(answer.token_ids) == 8


class TestRoom:
    """What is refused before it is unpacked. The tiny model holds 74,000 weights."""

    @pytest.fixture(autouse=True)
    def free(self, monkeypatch):
        self.host, self.card = 10**9, 10**9
        monkeypatch.setattr(quantize, "free_on_host", lambda: self.host)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.card, 24 * 10**9))

    def refusal(self, gguf, device, how=None):
        with pytest.raises(MemoryLimitError) as error:
            quantize.check_room(gguf, read_header(gguf), torch.bfloat16, torch.device(device), how)
        assert "\n" not in str(error.value)
        return str(error.value)

    def test_enough(self, gguf):
        for device, how in (("cpu", None), ("cuda", None), ("cuda", "nf4")):
            quantize.check_room(gguf, read_header(gguf), torch.bfloat16, torch.device(device), how)

    def test_a_card_that_holds_the_packed_weights_alone(self, gguf):
        self.card = 10**5
        assert "tiny.gguf is unpacked to bfloat16 on loading" in self.refusal(gguf, "cuda")
        assert "packs it to 0.00 GB, which fits" in self.refusal(gguf, "cuda")
        quantize.check_room(gguf, read_header(gguf), torch.bfloat16, torch.device("cuda"), "nf4")

    @pytest.mark.parametrize(("device", "how"), [("cpu", None), ("cuda", "nf4"), ("cuda", None)])
    def test_host_memory_that_is_too_small_to_unpack(self, gguf, device, how):
        self.host = 10**5
        assert "of host memory are free" in self.refusal(gguf, device, how)

    def test_input_embeddings_in_host_memory_leave_room(self, gguf):
        header, device = read_header(gguf), torch.device("cuda")
        self.card = 2 * (header.parameters - header.head)
        quantize.check_room(gguf, header, torch.bfloat16, device, None, host_embeddings=True)
        with pytest.raises(MemoryLimitError):
            quantize.check_room(gguf, header, torch.bfloat16, device, None)
        self.card -= 1
        with pytest.raises(MemoryLimitError):
            quantize.check_room(gguf, header, torch.bfloat16, device, None, host_embeddings=True)

    def test_it_is_checked_before_anything_is_read(self, gguf, monkeypatch):
        self.host = 10**5
        monkeypatch.setattr(loader.AutoModelForCausalLM, "from_pretrained", lambda *_: pytest.fail("loaded"))
        with pytest.raises(MemoryLimitError):
            load_model(str(gguf), torch.bfloat16, CPU, "nf4")


def test_scales_in_8_bits_leave_the_weights_as_near():
    """Double quantisation, which nf4 means here: the error of 9 % of a weight grows by less than a hundredth of it."""
    from bitsandbytes import functional

    config = loader._quantization("nf4", torch.float32)
    assert config.bnb_4bit_use_double_quant
    weight, errors, sizes = torch.randn(512, 1024, generator=torch.Generator().manual_seed(1)), [], []
    for double in (False, True):
        packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
        errors.append((functional.dequantize_4bit(packed, state) - weight).norm() / weight.norm())
        sizes.append(packed.nbytes + state.absmax.nbytes + (state.state2.absmax.nbytes if double else 0))
    assert 0.08 < errors[0] < 0.1
    assert errors[1] < 1.01 * errors[0]
    assert sizes[0] == weight.numel() * 4.5 / 8
    assert sizes[1] == nf4_bytes(weight.numel(), weight.numel() // 64) < 0.92 * sizes[0]


@pytest.mark.parametrize("how", [None, "nf4"])
@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_input_embeddings_never_lie_on_the_device(gguf, folder, monkeypatch, kind, how):
    """They are read into host memory and stay there. The device has another name here, and is the same."""
    card, moved, real = torch.device("cpu", 0), [], quantize.move

    def move(model, device, but=None):
        table = model.get_input_embeddings()
        moved.append((but is table, getattr(table, "weight", None)))
        real(model, device, but)

    asked, load = [], loader.AutoModelForCausalLM.from_pretrained

    def from_pretrained(*args, **options):
        asked.append(options["device_map"])
        return load(*args, **options)

    monkeypatch.setattr(loader, "move", move)
    monkeypatch.setattr(loader.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    source = str(gguf if kind == "gguf" else folder)
    model, _ = load_model(source, torch.float32, card, how, host_embeddings=True)
    (spared, table), (_, kept) = moved
    assert asked == [{"": CPU} if kind == "gguf" else {"": card, "model.embed_tokens": CPU}]
    assert spared
    assert isinstance(model.get_input_embeddings(), HostEmbedding)
    assert kept is model.get_input_embeddings().weight
    assert kept.data_ptr() == table.data_ptr(), "never copied"
    assert not any(hasattr(part, "_hf_hook") for part in model.modules())
    usual, _ = load_model(source, torch.float32, CPU, how)
    with torch.no_grad():
        assert torch.equal(model(prompt_ids(20)).logits, usual(prompt_ids(20)).logits)


def test_embeddings_that_cannot_be_in_host_memory_come_up_after_all(tmp_path, gguf):
    tied = tiny_model(vocab_size=261, tie_word_embeddings=True)
    tied.save_pretrained(tmp_path)
    load_model(str(gguf), torch.float32, CPU)[1].save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), torch.float32, torch.device("cpu", 0), host_embeddings=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_module_is_spared_where_that_is_asked_for():
    model = tiny_model()
    table = model.get_input_embeddings()
    quantize.move(model, torch.device("meta"), but=table)
    others = {weight.device.type for name, weight in model.named_parameters() if "embed_tokens" not in name}
    assert (table.weight.device.type, others) == ("cpu", {"meta"})


def test_what_is_said_of_it(gguf):
    said = quantize.note_on(gguf, torch.bfloat16, None)
    assert said == "tiny.gguf (0.00 GB) is unpacked to bfloat16 in host memory on loading: 0.00 GB"
    assert quantize.note_on(gguf, torch.bfloat16, "nf4") == f"{said}, and packed to nf4 on the device, layer by layer"


def test_tied_weights_stay_tied_on_another_device():
    """Else the largest weight of many models would be there twice."""
    model = tiny_model(tie_word_embeddings=True)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert head.weight is embedding.weight
    quantize.move(model, torch.device("meta"))
    assert {weight.device.type for weight in (*model.parameters(), *model.buffers())} == {"meta"}
    assert head.weight is embedding.weight
