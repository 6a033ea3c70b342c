"""Options by themselves: what each may be, in one sentence by its name."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from offload_triforce import InputError, TriForce
from offload_triforce.generation.options import RANGES, check_config, stop_list, tidy, token_ids
from tests.tiny import tiny_model

WHOLE = [name for name, allowed in RANGES.items() if allowed.whole]
SHARES = [name for name, allowed in RANGES.items() if allowed.most == 1]
REFUSED = [
    ("temperature", -0.1, "a number of at least 0, not -0.1"),
    ("temperature", "hot", "a number of at least 0, not 'hot'"),
    ("temperature", True, "a number of at least 0, not True"),
    ("temperature", float("inf"), "a number of at least 0, not inf"),
    ("top_k", -1, "a whole number of at least 0, not -1"),
    ("top_k", 2.5, "a whole number of at least 0, not 2.5"),
    ("top_p", 2, "a number from 0 to 1, not 2"),
    ("top_p", [0.5], "a number from 0 to 1, not [0.5]"),
    ("min_p", 1.5, "a number from 0 to 1, not 1.5"),
    ("top_h", 0, "a number above 0 and at most 1, not 0"),
    ("typical_p", 0, "a number above 0 and at most 1, not 0"),
    ("typical_p", 1.01, "a number above 0 and at most 1, not 1.01"),
    ("epsilon_cutoff", 1, "a number from 0 to below 1, not 1"),
    ("eta_cutoff", -1e-9, "a number from 0 to below 1, not -1e-09"),
    ("repetition_penalty", 0, "a number above 0, not 0"),
    ("repetition_penalty", "1.1", "a number above 0, not '1.1'"),
    ("no_repeat_ngram_size", -2, "a whole number of at least 0, not -2"),
    ("max_new_tokens", 0, "a whole number of at least 1, not 0"),
    ("max_new_tokens", 5.0, "a whole number of at least 1, not 5.0"),
    ("max_length", "9", "a whole number of at least 1, not '9'"),
    ("min_new_tokens", -1, "a whole number of at least 0, not -1"),
    ("max_time", 0, "a number above 0, not 0"),
    ("do_sample", "yes", "True or False, not 'yes'"),
    ("logits_processor", 5, "a list of callables, not 5"),
    ("stopping_criteria", [5], "a list of callables, not [5]"),
]


@pytest.mark.parametrize(("name", "value", "words"), REFUSED, ids=lambda part: repr(part)[:30])
def test_refused(name, value, words):
    with pytest.raises(InputError) as error:
        tidy({name: value})
    assert str(error.value) == f"{name} must be {words}"


@pytest.mark.parametrize("name", RANGES)
@given(value=st.floats() | st.integers() | st.booleans() | st.text(max_size=3) | st.just(float("nan")))
def test_what_is_taken_is_in_range_and_a_plain_number(name, value):
    try:
        taken = tidy({name: value})[name]
    except InputError:
        assert not RANGES[name].holds(value)
        return
    kind = int if name in WHOLE else float
    assert type(taken) is kind
    assert taken == kind(value)
    assert taken >= 0
    assert taken <= 1 or name not in SHARES


def test_numbers_of_other_kinds():
    assert tidy({"top_k": np.int64(5), "temperature": np.float32(0.5), "top_p": 1}) == {
        "top_k": 5,
        "temperature": 0.5,
        "top_p": 1.0,
    }


def test_none_is_not_given():
    options = dict.fromkeys([*RANGES, "stop_strings", "eos_token_id", "num_beams", "do_sample"])
    assert tidy({**options, "stop": None}) == options


def test_the_caller_s_options_stay_as_they_are():
    options = {"stop": ["a"], "top_p": 1}
    assert tidy(options) == {"stop_strings": ["a"], "top_p": 1.0}
    assert options == {"stop": ["a"], "top_p": 1}


def test_stop():
    assert tidy({"stop": "a"}) == tidy({"stop_strings": "a"}) == tidy({"stop": ("a",)}) == {"stop_strings": ["a"]}
    assert tidy({"stop": []}) == {"stop_strings": []}
    with pytest.raises(InputError, match="stop and stop_strings are the same; give one of them"):
        tidy({"stop": "a", "stop_strings": "a"})


@pytest.mark.parametrize(
    ("stop", "words"),
    [
        ("", "a stop string is empty"),
        (["a", ""], "a stop string is empty"),
        (7, "a text or a list of texts, not 7"),
        ([b"a"], "a text or a list of texts"),
        ({"a": 1}, "a text or a list of texts"),
    ],
)
def test_stop_refused(stop, words):
    with pytest.raises(InputError, match=words):
        stop_list(stop)


@pytest.mark.parametrize(
    ("given", "ids"),
    [
        (5, [5]),
        ([5, 6], [5, 6]),
        ((5, np.int64(6)), [5, 6]),
        (torch.tensor(5), [5]),
        (torch.tensor([5, 6]), [5, 6]),
        (torch.tensor([[5], [6]]), [5, 6]),
        ([torch.tensor(5), 6], [5, 6]),
        ([], []),
    ],
)
def test_token_ids(given, ids):
    assert token_ids("eos_token_id", given) == ids


@pytest.mark.parametrize("given", ["</s>", 5.0, [5, "6"], torch.tensor([0.5]), True, [None]])
def test_token_ids_refused(given):
    with pytest.raises(InputError, match="eos_token_id must be a token id or a list of them, not"):
        token_ids("eos_token_id", given)


@pytest.mark.parametrize("name", ["num_beams", "num_return_sequences"])
def test_one_only(name):
    """The first that says anything counts; and the sentence names the option, whoever gave it."""
    two, one = GenerationConfig(**{name: 2}, do_sample=True), GenerationConfig(**{name: 1})
    for options, configs in [({name: 2}, []), ({}, [two]), ({}, [None, two]), ({name: None}, [two, one])]:
        with pytest.raises(InputError, match=f"{name}=2 is not supported; only 1 is"):
            tidy(options, *configs)
    for options, configs in [({}, []), ({name: 1}, [two]), ({}, [one, two])]:
        tidy(options, *configs)
    with pytest.raises(InputError, match=f"{name}='2' is not supported"):
        tidy({name: "2"})


def test_merged_configs():
    """What transformers itself lets pass."""
    check_config(GenerationConfig())
    check_config(GenerationConfig(top_p=2.0))  # greedy: not in use
    for config, words in [
        (GenerationConfig(top_p=2.0, do_sample=True), "top_p must be"),
        (GenerationConfig(no_repeat_ngram_size=-1), "no_repeat_ngram_size must be"),
        (GenerationConfig(num_beams=2), "num_beams=2"),
        (GenerationConfig(stop_strings=""), "a stop string is empty"),
    ]:
        with pytest.raises(InputError, match=words):
            check_config(config)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 1.5}, "seed must be a whole number, not 1.5"),
        ({"seed": "x"}, "seed must be a whole number, not 'x'"),
        ({"seed": True}, "seed must be a whole number, not True"),
        ({"streamer": 5}, "streamer must have put and end, as a transformers streamer has; int lacks them"),
        ({"generation_config": {"top_p": 0.5}}, "generation_config must be a transformers GenerationConfig, not dict"),
    ],
)
def test_refused_by_the_engine(engine, options, words):
    with pytest.raises(InputError, match=words):
        engine.generate([5, 6], **{"max_new_tokens": 2, **options})
    assert engine.runtime is None, "before the work starts"


@pytest.fixture
def engine():
    with TriForce(tiny_model()) as engine:
        yield engine
