"""GGUF headers: how long a file has to be, and what is wrong with one that is not whole."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload_triforce import TriForce
from offload_triforce.errors import InputError, TriForceError, UnsupportedModelError
from offload_triforce.model.fetch import fetch_model
from offload_triforce.model.gguf_header import read_header
from offload_triforce.model.loader import load_model, max_positions
from tests.tiny_gguf import save_tiny_gguf

CPU = torch.device("cpu")


def load(path):
    return load_model(str(path), torch.float32, CPU)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save_tiny_gguf(tmp_path_factory.mktemp("gguf") / "whole.gguf", eot_token_id=5, eom_token_id=6)


def test_the_header_says_how_long_the_file_is(whole):
    header = read_header(whole)
    assert header.needed == whole.stat().st_size
    assert header.values["general.architecture"] == "llama"
    assert header.values["tokenizer.ggml.eot_token_id"] == 5
    assert header.values["tokenizer.ggml.add_bos_token"] is False
    assert header.values["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert "tokenizer.ggml.tokens" not in header.values  # arrays are left out


def test_the_real_one():
    path = Path(fetch_model("smollm2", hub=False))
    assert read_header(path).needed == path.stat().st_size == 98_362_432


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_refused(whole, tmp_path, share):
    data = whole.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(InputError, match=r"is incomplete|is not a GGUF file") as error:
        read_header(path)
    assert "\n" not in str(error.value)


def test_a_download_that_broke_off_is_told_in_bytes(whole, tmp_path):
    data = whole.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[:-100])
    expected = f"{path} is incomplete: {len(data) - 100:,} of {len(data):,} bytes, 100 too few; get it again"
    for read in (read_header, lambda path: max_positions(str(path)), load):
        with pytest.raises(InputError) as error:
            read(path)
        assert str(error.value) == expected
    path.write_bytes(data[:1000])
    with pytest.raises(InputError, match=r"its header goes on to byte .* but there are 1,000"):
        read_header(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(4, 6000), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_header_is_one_sentence_or_still_a_header(whole, tmp_path, changes):
    data = bytearray(whole.read_bytes())
    for at, value in changes:
        data[at] = value
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    said = ""
    try:
        assert read_header(path).needed <= len(data)
    except InputError as error:
        said = str(error)
    assert said == "" or (str(path) in said and "\n" not in said)


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"", "it is empty"),
        (b"A text that somebody called a model\n", "is not a GGUF file: it starts with b'A text that some'"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "Git LFS pointer"),
        (b"GGUF\x01\0\0\0" + bytes(40), "of version 1; convert the model"),
        (b"GGUF\0\0\0\x03" + bytes(40), "big-endian, version 3; convert the model"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 40, "incomplete or damaged"),
    ],
)
def test_what_is_no_gguf_file(start, words, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(start)
    for read in (read_header, load):
        with pytest.raises(InputError) as error:
            read(path)
        assert words in str(error.value)
        assert "\n" not in str(error.value)


def test_an_architecture_that_transformers_does_not_read(tmp_path):
    path = save_tiny_gguf(tmp_path / "model.gguf", "nonsense")
    with pytest.raises(UnsupportedModelError, match=r"does not read from GGUF.*nonsense"):
        load_model(str(path), torch.float32, CPU)
    with pytest.raises(TriForceError, match="nonsense"):
        max_positions(str(path))


@pytest.mark.parametrize(
    ("values", "ends"),
    [
        ({}, 2),
        ({"eot_token_id": 5, "eom_token_id": 6}, [2, 5, 6]),
        ({"eot_token_id": 2}, 2),
        ({"eot_token_id": 10**6}, 2),
    ],
)
def test_every_token_that_ends_an_answer_does(values, ends, tmp_path):
    """transformers reads the first kind alone, and a chat model would talk on."""
    model, tokenizer = load_model(str(save_tiny_gguf(tmp_path / "model.gguf", **values)), torch.float32, CPU)
    assert model.generation_config.eos_token_id == ends
    assert tokenizer.decode(tokenizer("naïve").input_ids) == "naïve"


def test_an_answer_ends_with_the_turn(tmp_path):
    """The token that a plain answer has in its middle, made the end of a turn."""
    small = {"budget": 64, "chunk": 4, "sink": 4, "recent": 16, "tile": 16, "gamma": 4, "dtype": "float32"}
    with TriForce.load(str(save_tiny_gguf(tmp_path / "a.gguf")), device="cpu", **small) as engine:
        whole = engine.generate("To be or not to be", max_new_tokens=30, do_sample=False).token_ids
    turn = whole[5]
    path = save_tiny_gguf(tmp_path / "b.gguf", eot_token_id=turn)
    with TriForce.load(str(path), device="cpu", **small) as engine:
        ended = engine.generate("To be or not to be", max_new_tokens=30, do_sample=False).token_ids
    assert ended == whole[: whole.index(turn) + 1] != whole
