"""Why an answer ends: by the criteria alone, and through the engine."""

import pytest
import torch
from transformers import MaxLengthCriteria, MaxTimeCriteria, StoppingCriteria, StoppingCriteriaList, StopStringCriteria
from transformers.generation import EosTokenCriteria

from offload_triforce import TriForce
from offload_triforce.generation.ending import ending
from tests.byte_tokenizer import byte_tokenizer
from tests.test_engine import SMALL, Dictate
from tests.tiny import tiny_model

TOKENIZER = byte_tokenizer()
IDS = torch.tensor(TOKENIZER("a b").input_ids)


class AfterThree(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([input_ids.shape[1] >= 3])


def by_function(input_ids, scores, **kwargs):
    return True


EOS, STRING = EosTokenCriteria(int(IDS[-1])), StopStringCriteria(TOKENIZER, ["b"])
LENGTH, TIME, OWN = MaxLengthCriteria(3), MaxTimeCriteria(1e-9, 0.0), AfterThree()


@pytest.mark.parametrize(
    ("criteria", "reason"),
    [
        ([], None),
        ([MaxLengthCriteria(4), EosTokenCriteria(0), StopStringCriteria(TOKENIZER, ["c"])], None),
        ([LENGTH], "length"),
        ([EOS], "stop"),
        ([STRING], "stop_string"),
        ([TIME], "max_time"),
        ([OWN], "AfterThree"),
        ([by_function], "by_function"),
        ([LENGTH, OWN], "AfterThree"),
        ([LENGTH, TIME], "max_time"),
        ([OWN, TIME, STRING], "stop_string"),
        ([LENGTH, OWN, TIME, STRING, EOS], "stop"),
    ],
)
def test_reasons(criteria, reason):
    """The first of several in a fixed order: what the text says before what was imposed upon it."""
    assert ending(StoppingCriteriaList(criteria), IDS) == reason
    assert ending(list(reversed(criteria)), IDS) == reason


def test_every_criterion_is_asked_once():
    """As transformers does, also behind one that ends the text: it may count."""
    asked = []

    def count(input_ids, scores, **kwargs):
        asked.append((input_ids.tolist(), scores))
        return torch.tensor([True])

    assert ending([count, EOS, count], IDS) == "stop"
    assert asked == [([IDS.tolist()], None)] * 2


@pytest.fixture(scope="module")
def engine():
    with TriForce(tiny_model("llama", seed=1, calm=True, vocab_size=259), TOKENIZER, draft="ngram", **SMALL) as engine:
        yield engine


def said(engine, text, **options):
    """The answer of a model that wants to say a text, then its end."""
    ids = [*TOKENIZER(text).input_ids, TOKENIZER.eos_token_id]
    prompt = TOKENIZER("x" * 30).input_ids
    options = {"eos_token_id": TOKENIZER.eos_token_id, **options}
    if "max_length" not in options:
        options.setdefault("max_new_tokens", len(ids) + 5)
    return engine.generate(prompt, do_sample=False, logits_processor=[Dictate(len(prompt), ids)], **options)


@pytest.mark.parametrize(
    ("options", "text", "reason"),
    [
        ({}, "It was the best.", "stop"),
        ({"eos_token_id": torch.tensor([1, TOKENIZER.eos_token_id])}, "It was the best.", "stop"),
        ({"max_new_tokens": 6}, "It was", "length"),
        ({"max_length": 36}, "It was", "length"),
        ({"max_new_tokens": 17}, "It was the best.", "stop"),
        ({"max_new_tokens": 16}, "It was the best.", "length"),
        ({"stop": "the"}, "It was the", "stop_string"),
        ({"stop": ["best", "was"]}, "It was", "stop_string"),
        ({"stop": "best", "max_new_tokens": 6}, "It was", "length"),
        ({"stopping_criteria": [lambda ids, scores, **_: torch.tensor([ids.shape[1] >= 33])]}, "It ", "<lambda>"),
        ({"max_time": 1e-9}, "I", "max_time"),
    ],
)
def test_answers(engine, options, text, reason):
    """Whatever the pass would have brought beyond it."""
    result = said(engine, "It was the best.", **options)
    assert (result.text, result.finish_reason) == (text, reason)
    assert result.stats.as_dict()["finish_reason"] == reason
    assert not result.stats.interrupted


def test_interrupted(engine):
    """None while it is coming; and whoever leaves after all of it has come has interrupted nothing."""
    stream = engine.stream("x" * 30, max_new_tokens=40, do_sample=False)
    assert stream.result.finish_reason is None
    next(stream)
    assert stream.result.finish_reason is None
    iter(stream).close()
    assert stream.result.finish_reason == "interrupted"
    for _ in (stream := engine.stream("x" * 30, max_new_tokens=1, temperature=0)):
        break
    iter(stream).close()
    assert (stream.result.finish_reason, stream.stats.interrupted) == ("length", False)
