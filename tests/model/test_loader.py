"""Loading by folder, hub id and quantisation; every mistake is one sentence that names what is wrong."""

import importlib.util
import shutil

import pytest
import torch
import transformers

from offload_triforce import InputError, TriForce, UnsupportedModelError
from offload_triforce.machine.doctor import check_quantiser
from offload_triforce.model.loader import load_model, max_positions, resolve_device, resolve_dtype
from tests.byte_tokenizer import byte_tokenizer, save_tiny_llama
from tests.tiny import greedy, prompt_ids, tiny_model

CPU = torch.device("cpu")
SMALL = {"budget": 64, "chunk": 4, "sink": 4, "recent": 16, "tile": 16, "draft_cache": 64, "gamma": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", eos_token_id=None)


@pytest.fixture
def offline(monkeypatch):
    """What HF_HUB_OFFLINE=1 sets when it is there before the import."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def refusal(source, kind=InputError, **options):
    with pytest.raises(kind) as error:
        load_model(str(source), torch.float32, CPU, **options)
    message = str(error.value)
    assert "\n" not in message
    assert message.count(". ") <= 1
    return message


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_folder(folder, dtype):
    kind = getattr(torch, dtype)
    model, tokenizer = load_model(str(folder), kind, CPU)
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert {p.dtype for p in model.parameters()} == {kind}
    assert not model.training
    assert tokenizer.decode(tokenizer("naïve").input_ids) == "naïve"
    assert max_positions(str(folder)) == 4096


def test_load_generates_what_transformers_does(folder):
    with TriForce.load(str(folder), draft="self", dtype="float32", device="cpu", **SMALL) as engine:
        result = engine.generate("To be, or not to be, that is the question", max_new_tokens=40, do_sample=False)
        ids = engine.tokenizer("To be, or not to be, that is the question", return_tensors="pt").input_ids
        assert result.prompt_ids == ids[0].tolist()
        assert result.token_ids == greedy(engine.model, ids, 40)
        assert result.text == engine.tokenizer.decode(result.token_ids, skip_special_tokens=True)


def test_draft_by_name(folder):
    with TriForce.load(str(folder), draft=str(folder), dtype="float32", device="cpu", **SMALL) as engine:
        result = engine.generate("a" * 100, max_new_tokens=30, do_sample=False)
        assert result.token_ids == greedy(engine.model, torch.tensor([result.prompt_ids]), 30)
        assert result.stats.draft.accepted > 0


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "~/nowhere/at/all", "a/b/c", "nowhere/", "x\\y"])
def test_no_such_folder(source, offline):
    assert source in refusal(source)


def test_no_such_file():
    assert refusal("/nowhere/model.gguf") == "no such file: /nowhere/model.gguf"


@pytest.mark.parametrize("content", [b"not a gguf file", b"", b"GGUF" + bytes([3, 0, 0, 0]) + bytes(16)])
def test_not_gguf(tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert refusal(path).startswith(f"{path} is ")
    assert refusal(tmp_path).startswith(f"{path} is ")


def test_folder_named_like_a_file(tmp_path):
    (tmp_path / "model.gguf").mkdir()
    assert "holds neither config.json nor a GGUF file" in refusal(tmp_path / "model.gguf")


@pytest.mark.parametrize("source", ["~nobody-of-that-name/model", "x" * 5000, "x" * 5000 + ".gguf"])
def test_names_that_the_system_refuses(source, offline):
    assert source in refusal(source)


def test_other_file(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(b"")
    assert "is a file but not a .gguf file" in refusal(path)


def test_folder_without_model(tmp_path):
    assert refusal(tmp_path) == f"folder {tmp_path} holds neither config.json nor a GGUF file"


def test_folder_with_two_ggufs(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.gguf").write_bytes(b"")
    assert refusal(tmp_path) == f"folder {tmp_path} holds 2 GGUF files; name one"


def test_config_that_is_not_json(tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert "not a valid JSON file" in refusal(tmp_path)


def test_weights_missing(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    assert "no file named model.safetensors" in refusal(tmp_path / "m")


def test_weights_cut_off(folder, tmp_path):
    """A download that broke off."""
    shutil.copytree(folder, tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert str(tmp_path) in refusal(tmp_path / "m")


def test_unknown_model_type(folder, tmp_path):
    """The sentence has to say that it is the model type."""
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text('{"model_type": "nonsense"}')
    (tmp_path / "m" / "tokenizer.json").unlink()
    assert "nonsense" in refusal(tmp_path / "m", (InputError, UnsupportedModelError))


@pytest.mark.parametrize("source", ["nobody/no-such-model", "no-such-model"])
def test_hub_out_of_reach(source, offline):
    assert refusal(source).startswith(f"{source!r} is neither a local folder or GGUF file nor in the hub's cache here")


def test_not_even_a_hub_id():
    assert refusal("what is this").startswith("'what is this' is neither a local folder")


def save(model, folder):
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_encoder_decoder_folder(tmp_path):
    config = transformers.T5Config(vocab_size=259, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    folder = save(transformers.T5ForConditionalGeneration(config), tmp_path)
    message = refusal(folder, UnsupportedModelError)
    assert message.startswith("T5ForConditionalGeneration is an encoder-decoder")


def test_refused_before_the_weights_are_read(tmp_path):
    """Whether the configuration says it or only a step through the model shows it."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
    deaf = transformers.StableLmConfig(vocab_size=259, intermediate_size=16, num_key_value_heads=1, **sizes)
    for config, reason in (
        (transformers.MambaConfig(vocab_size=259, hidden_size=16, num_hidden_layers=1), "'linear_attention'"),
        (deaf, "does not hand keywords down to its attention"),
    ):
        config.save_pretrained(tmp_path)  # and nothing else
        assert reason in refusal(tmp_path, UnsupportedModelError)


def test_encoder_decoder_folder_with_a_causal_class(tmp_path):
    parts = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 16))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.BartConfig(vocab_size=259, d_model=16, **parts, **heads)
    save(transformers.BartForConditionalGeneration(config), tmp_path)
    with pytest.raises(UnsupportedModelError):
        TriForce.load(str(tmp_path), dtype="float32", device="cpu")


def test_devices(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == CPU
    for name in ("cuda", "cuda:1"):
        with pytest.raises(InputError, match=f"device '{name}' was asked for, but torch finds no CUDA device"):
            resolve_device(name)
    for name in ("tpu", "cuda:x", ""):
        with pytest.raises(InputError, match=f"unknown device '{name}'; use auto, cuda, cuda:N or cpu"):
            resolve_device(name)
    with pytest.raises(InputError, match="device 'mps' is not supported"):
        resolve_device("mps")


def test_devices_with_cuda(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(InputError, match="device 'cuda:2' does not exist; there are 2 CUDA devices"):
        resolve_device("cuda:2")


def test_dtypes():
    assert resolve_dtype("auto", CPU) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype("float16", CPU) == torch.float16
    with pytest.raises(InputError, match="unknown dtype 'fp8'; use auto, float32, bfloat16, float16"):
        resolve_dtype("fp8", CPU)


def test_mistakes_come_before_the_weights(folder, monkeypatch, offline):
    """A setting that cannot be, or a draft that is not there, is refused without loading anything."""
    monkeypatch.setattr("offload_triforce.engine.load_model", lambda *_: pytest.fail("loaded"))
    mistakes = [{"dtype": "fp8"}, {"device": "tpu"}, {"gamma": -1}, {"bugdet": 5}, {"context": 5000}]
    mistakes += [{"context": "5K"}, {"context": "lots"}, {"draft": "nobody/none"}, {"draft": "ngram+./nowhere"}]
    for options in mistakes:
        with pytest.raises(InputError):
            TriForce.load(str(folder), **options)


def test_unknown_quantisation(folder):
    assert refusal(folder, quantize="q4") == "unknown quantisation 'q4'; use nf4 or int8"


def test_quantise_without_bitsandbytes(folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a))
    assert "pip install 'offload-triforce[bnb]'" in refusal(folder, quantize="int8")


@pytest.mark.parametrize(
    ("found", "refused"), [("0.49.2", True), ("0.9.1", True), ("0.50.0.dev0", False), ("1.0", False)]
)
def test_an_older_bitsandbytes_is_refused_before_anything_is_looked_for(found, refused, monkeypatch):
    """It would write all weights out in each step of more than one token."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("offload_triforce.machine.packages.metadata.version", lambda name: found)
    for load in (TriForce.load, lambda *_, quantize: load_model("no/such/model", torch.float32, CPU, quantize)):
        with pytest.raises(InputError) as error:
            load("./no/such/model", quantize="nf4")
        said = str(error.value)
        assert ("--quantize nf4 needs bitsandbytes 0.50 or newer" in said) == refused
        assert (found in said and "pip install -U bitsandbytes" in said) == refused
    finding = check_quantiser()
    assert (finding.state, finding.remedy) == (("missing", "pip install -U bitsandbytes") if refused else ("ok", None))
    assert not refused or found in finding.found


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_quantised(folder, quantize, monkeypatch):
    """Greedy equals transformers' own generate on the same quantised weights.

    With bitsandbytes' default threshold, int8 computes a column in 16 bits when any token of the same call has an
    outlier there: what the model says then depends on how a text is cut into calls, even within transformers.
    """
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("transformers.BitsAndBytesConfig.__init__", without_outliers)
    with TriForce.load(str(folder), draft="self", dtype="float32", device="cpu", quantize=quantize, **SMALL) as engine:
        kinds = {type(m).__name__ for m in engine.model.modules()}
        assert {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[quantize] in kinds
        prompt = prompt_ids(100)
        result = engine.generate(prompt, max_new_tokens=60, do_sample=False)
        assert result.token_ids == greedy(engine.model, prompt, 60)
        assert len(set(result.token_ids)) > 5
        assert engine.layout.dtype == torch.float32


def without_outliers(self, *args, original=transformers.BitsAndBytesConfig.__init__, **kwargs):
    original(self, *args, llm_int8_threshold=0.0, **kwargs)


def test_int8_as_it_is_loaded(folder):
    pytest.importorskip("bitsandbytes")
    with TriForce.load(str(folder), dtype="float32", device="cpu", quantize="int8", **SMALL) as engine:
        assert len(engine.generate(prompt_ids(100), max_new_tokens=20, do_sample=False).token_ids) == 20


def test_draft_with_another_vocabulary(folder):
    """By size where there is no tokenizer to compare, by the tokens themselves where there are two."""
    with pytest.raises(InputError, match=r"the draft's vocabulary of 101 tokens is not the target's of 259"):
        TriForce(tiny_model(vocab_size=259), draft=tiny_model(seed=1))
    model, tokenizer = load_model(str(folder), torch.float32, CPU)
    other = byte_tokenizer()
    other.add_tokens(["<think>"])
    with pytest.raises(InputError, match=r"the draft's tokenizer is not the target's: 1 of 259 tokens differ"):
        TriForce(model, tokenizer, draft=model, draft_tokenizer=other)


def test_draft_with_permuted_tokens(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "draft")
    path = tmp_path / "draft" / "tokenizer.json"
    text = path.read_text(encoding="utf-8").replace('"!": 3', '"!": 999').replace('"\\"": 4', '"\\"": 3')
    path.write_text(text.replace('"!": 999', '"!": 4'), encoding="utf-8")
    with pytest.raises(InputError, match=r"the draft's tokenizer is not the target's: 2 of 259 tokens differ") as error:
        TriForce.load(str(folder), draft=str(tmp_path / "draft"), dtype="float32", device="cpu")
    assert "\n" not in str(error.value)
