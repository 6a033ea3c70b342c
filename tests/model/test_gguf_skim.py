"""A GGUF file's configuration without its vocabulary: the same one, of fewer parts. And its weights, counted."""

import gguf
import pytest
from transformers import AutoConfig

from offload_triforce.model import gguf_skim
from offload_triforce.model.gguf_header import read_header
from offload_triforce.model.gguf_skim import skimming
from tests.tiny_gguf import save_tiny_gguf


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


def read(path):
    return AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()


@pytest.mark.parametrize("longest", [0, 10, 10_000])
def test_the_same_configuration(path, monkeypatch, longest):
    """Its number of tokens too, which transformers may have to count. 10: texts and numbers are skipped alike."""
    monkeypatch.setattr(gguf_skim, "LONG", longest)
    expected = read(path)
    with skimming():
        assert read(path) == expected
    assert gguf.GGUFReader is not gguf_skim._Skimmer


def test_long_lists_are_not_taken_apart(path, monkeypatch):
    """Each text is an object of its own, and a vocabulary has hundreds of thousands."""
    monkeypatch.setattr(gguf_skim, "LONG", 10)
    whole, skimmed = gguf.GGUFReader(path), gguf_skim._Skimmer(path)
    assert skimmed.fields.keys() == whole.fields.keys()
    for name, field in whole.fields.items():
        short, long = skimmed.fields[name], len(field.data)
        assert len(short.data) == long
        assert short.types == field.types
        assert len(short.parts) <= 3 + 2 * 10 + 2
    tokens = "tokenizer.ggml.tokens"
    assert len(whole.fields[tokens].parts) > 500 > len(skimmed.fields[tokens].parts)
    assert [tensor.name for tensor in skimmed.tensors] == [tensor.name for tensor in whole.tensors]
    assert [tensor.data_offset for tensor in skimmed.tensors] == [tensor.data_offset for tensor in whole.tensors]


def test_a_header_that_breaks_off_is_an_error_that_is_expected(path, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_skim, "LONG", 10)
    short = tmp_path / "short.gguf"
    short.write_bytes(path.read_bytes()[:1500])
    with pytest.raises((ValueError, IndexError)):
        gguf_skim._Skimmer(short)


def test_the_reader_comes_back_after_an_error(path):
    before = gguf.GGUFReader
    with pytest.raises(KeyError), skimming():
        raise KeyError
    assert gguf.GGUFReader is before


def test_weights_are_counted_from_the_header_alone(path):
    assert read_header(path).parameters == sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(path).tensors)
