"""An answer as an object: short to look at; streamed text through the engine for a byte-fallback tokenizer."""

import pytest

from offload_triforce import Generation, TriForce
from offload_triforce.speculation.stats import DecodeStats
from tests.test_engine import SMALL, Dictate
from tests.tiny import tiny_model
from tests.tokenizer_kinds import bytes_alone, llama2


def test_repr_is_short():
    result = Generation("Once upon a time", list(range(1000)), list(range(5000)), DecodeStats(), "length")
    assert (
        repr(result) == "Generation('Once upon a time', 5,000 prompt tokens, 1,000 new tokens, finish_reason='length')"
    )
    long = repr(Generation("a line\n" * 1000, list(range(1000)), [], DecodeStats()))
    assert len(long) < 200
    assert "a line\\na line" in long
    assert "..." in long


@pytest.mark.parametrize("gamma", [0, 4])
@pytest.mark.parametrize("make", [bytes_alone, llama2])
@pytest.mark.parametrize("left_out", range(5))
def test_streamed_text_of_byte_fallback(make, gamma, left_out):
    """Cut anywhere by the limit of new tokens: the pieces are the text."""
    tokenizer = make()
    ids = tokenizer("你好世界🚀", add_special_tokens=False).input_ids
    ids = ids[: len(ids) - left_out]
    model = tiny_model("llama", seed=1, calm=True, vocab_size=len(tokenizer))
    with TriForce(model, tokenizer, draft="ngram", **{**SMALL, "gamma": gamma}) as engine:
        prompt = list(range(3, 33))
        options = {"max_new_tokens": len(ids), "logits_processor": [Dictate(len(prompt), ids)]}
        stream = engine.stream(prompt, do_sample=False, **options)
        pieces = list(stream)
    assert stream.result.token_ids == ids
    assert "".join(pieces) == stream.result.text == tokenizer.decode(ids)
    assert stream.result.text == "你好世界🚀" or left_out
