"""A model's folder that is not whole: every missing, broken or short file is named."""

import json
import shutil

import pytest
import torch

from offload_triforce import InputError
from offload_triforce.model.loader import load_model, max_positions
from offload_triforce.model.local_files import check_folder
from tests.byte_tokenizer import save_tiny_llama

CPU = torch.device("cpu")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
JSONS = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "whole")


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def refusal(folder, read=check_folder):
    with pytest.raises(InputError) as error:
        read(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def load(folder):
    return load_model(str(folder), torch.float32, CPU)


def test_a_whole_folder(folder):
    check_folder(folder)


@pytest.mark.parametrize("name", JSONS)
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"null", b"[" * 100_000, b"\xff\xfe\0", b"version https://git-lfs"]
)
def test_json_that_is_none(folder, name, content):
    (folder / name).write_bytes(content)
    for read in (check_folder, load, lambda folder: max_positions(str(folder))):
        assert refusal(folder, read).startswith(f"{folder / name} ")


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "x"},
        {"hidden_size": -5},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 1e400},
        {"model_type": 3},
        {"model_type": None},
        {"vocab_size": []},
    ],
)
def test_configurations_that_cannot_be(folder, changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(Exception, match=str(folder)) as error:
        load(folder)
    assert type(error.value).__module__ == "offload_triforce.errors"
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["{}", '{"version": "1.0", "model": {"type": "Nope"}}'])
def test_a_tokenizer_of_no_kind(folder, content):
    (folder / "tokenizer.json").write_text(content)
    assert refusal(folder, load).startswith(f"the tokenizer of {folder} could not be loaded: ")


def test_no_tokenizer_at_all(folder):
    (folder / "tokenizer.json").unlink()
    assert "comes without a tokenizer" in refusal(folder, load)


def test_weights_cut_anywhere(folder):
    path = folder / WEIGHTS
    data = path.read_bytes()
    for size in (0, 4, 8, 100, 5000, len(data) - 1):
        path.write_bytes(data[:size])
        assert refusal(folder).startswith(f"{path} is incomplete: ")
    assert (
        refusal(folder, load)
        == f"{path} is incomplete: {len(data) - 1:,} of {len(data):,} bytes, 1 too few; get it again"
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"A text that somebody called weights", "is not a safetensors file: it starts with b'A text t'"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "is a Git LFS pointer"),
        ((9).to_bytes(8, "little") + b"not JSON!" + bytes(100), "is damaged"),
        ((2).to_bytes(8, "little") + b"[]" + bytes(100), "is damaged"),
        ((9).to_bytes(8, "little") + b'{"a": {}}' + bytes(100), "is damaged"),
    ],
)
def test_weights_that_are_none(folder, content, words):
    (folder / WEIGHTS).write_bytes(content)
    for read in (check_folder, load):
        assert words in refusal(folder, read)


def shards(folder, names):
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))


def test_shards_that_are_missing(folder):
    data = (folder / WEIGHTS).read_bytes()
    shards(folder, {f"layer.{i}": f"{i}.safetensors" for i in range(6)})
    assert refusal(folder).startswith(f"{folder} lacks 6 of 6 files of weights: 0.safetensors, 1.safetensors, 2.safe")
    for i in range(5):
        (folder / f"{i}.safetensors").write_bytes(data)
    assert refusal(folder) == f"{folder} lacks 1 of 6 files of weights: 5.safetensors; get them again"
    (folder / "5.safetensors").write_bytes(data[:-1])
    assert refusal(folder).startswith(f"{folder / '5.safetensors'} is incomplete: ")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_none(folder, content):
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(content)
    for read in (check_folder, load):
        assert refusal(folder, read).startswith(f"{folder / INDEX} ")


def test_weights_that_are_not_there_are_not_made_up(folder):
    """transformers draws them at random, and says so in a log."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 3}))
    message = refusal(folder, load)
    assert "lack 9 of the weights that its configuration asks for, such as model.layers.2." in message


def test_weights_of_other_shapes(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 72}))
    assert "have other shapes than its configuration asks for" in refusal(folder, load)


def test_junk_in_another_format(folder):
    (folder / WEIGHTS).unlink()
    for junk in (b"", b"junk" * 10):
        (folder / "pytorch_model.bin").write_bytes(junk)
        assert refusal(folder, load).startswith(f"the weights of {folder} could not be loaded: ")
