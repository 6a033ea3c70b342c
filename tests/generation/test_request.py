"""What is asked for is read as transformers reads it; what cannot be decoded exactly is refused in one sentence."""

import warnings

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StoppingCriteriaList, WatermarkingConfig
from transformers.generation import EosTokenCriteria

from offload_triforce import InputError, Settings, TriForce, stateless
from offload_triforce.generation.request import DEFAULT_NEW_TOKENS, Request, as_request, interpret
from tests.byte_tokenizer import byte_tokenizer
from tests.tiny import prompt_ids, tiny_model

PROMPT = prompt_ids(10)


@pytest.fixture(scope="module")
def shared_model():
    return tiny_model("llama")


@pytest.fixture
def model(shared_model, monkeypatch):
    """Tests may change the generation config: they get one of their own."""
    monkeypatch.setattr(shared_model, "generation_config", GenerationConfig(pad_token_id=0))
    return shared_model


def read(model, config=None, prompt=PROMPT, tokenizer=None, **options):
    return interpret(model, prompt, config, tokenizer, options)


def names(things):
    return [type(thing).__name__ for thing in things]


def test_plain(model):
    request = read(model)
    assert torch.equal(request.prompt, PROMPT[0])
    assert request.prompt.device.type == "cpu"
    assert (request.do_sample, request.max_new_tokens, request.eos) == (False, DEFAULT_NEW_TOKENS, frozenset())
    assert names(request.processors) == []
    assert names(request.criteria) == ["MaxLengthCriteria"]


def test_prompt_shapes(model):
    assert torch.equal(read(model, prompt=PROMPT[0]).prompt, read(model, prompt=PROMPT).prompt)


@pytest.mark.parametrize(
    ("options", "do_sample", "processors"),
    [
        ({"temperature": 0.7}, True, ["TemperatureLogitsWarper"]),
        ({"temperature": 1}, True, []),
        ({"temperature": 0}, False, []),
        ({"temperature": 0.0, "top_p": 0.9, "top_k": 5, "min_p": 0.1}, False, []),
        ({"temperature": 0.7, "top_k": 7}, True, ["TemperatureLogitsWarper", "TopKLogitsWarper"]),
        ({"temperature": 0.7, "top_p": 0.9}, True, ["TemperatureLogitsWarper", "TopPLogitsWarper"]),
        ({"temperature": 0.7, "min_p": 0.1}, True, ["TemperatureLogitsWarper", "MinPLogitsWarper"]),
        ({"temperature": 0.7, "do_sample": False}, False, []),
        ({"temperature": 0.7, "do_sample": True}, True, ["TemperatureLogitsWarper", "TopKLogitsWarper"]),
        ({"do_sample": True}, True, ["TopKLogitsWarper"]),
        ({"do_sample": True, "top_k": 0}, True, []),
        ({"repetition_penalty": 1.2}, False, ["RepetitionPenaltyLogitsProcessor"]),
    ],
)
def test_sampling(model, options, do_sample, processors):
    """A temperature alone means sampling from the whole distribution; do_sample means what transformers means."""
    request = read(model, **options)
    assert request.do_sample == do_sample
    assert names(request.processors) == processors


def test_top_k_is_50_by_default_in_transformers(model):
    assert read(model, do_sample=True).processors[0].top_k == 50


def test_temperature_beside_a_config_leaves_its_top_k(model):
    request = read(model, GenerationConfig(top_k=9), temperature=0.7)
    assert request.do_sample
    assert names(request.processors) == ["TemperatureLogitsWarper", "TopKLogitsWarper"]
    assert request.processors[1].top_k == 9


def test_model_defaults_fill_the_rest(model):
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.1, eos_token_id=[7, 8]
    )
    request = read(model)
    assert request.do_sample
    assert request.eos == {7, 8}
    expected = ["RepetitionPenaltyLogitsProcessor", "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper"]
    assert names(request.processors) == expected
    greedy = read(model, temperature=0)
    assert not greedy.do_sample
    assert names(greedy.processors) == ["RepetitionPenaltyLogitsProcessor"]


@pytest.mark.parametrize(
    ("config", "options", "tokens"),
    [
        (None, {"max_new_tokens": 7}, 7),
        (None, {"max_length": 17}, 7),
        (None, {"max_new_tokens": 7, "max_length": 99}, 7),
        (GenerationConfig(max_new_tokens=7), {}, 7),
        (GenerationConfig(max_length=17), {}, 7),
        (GenerationConfig(max_new_tokens=9), {"max_new_tokens": 7}, 7),
        (GenerationConfig(top_p=0.9), {}, DEFAULT_NEW_TOKENS),
    ],
)
def test_lengths(model, config, options, tokens):
    assert read(model, config, **options).max_new_tokens == tokens


def test_length_from_the_model_s_defaults(model):
    model.generation_config.max_new_tokens = 7
    assert read(model).max_new_tokens == 7
    assert read(model, max_new_tokens=3).max_new_tokens == 3


def test_given_processors_and_criteria_are_kept(model):
    def mine(input_ids, scores):
        return scores

    request = read(model, logits_processor=[mine], stopping_criteria=StoppingCriteriaList([EosTokenCriteria(5)]))
    assert request.processors[0] is mine
    assert names(request.criteria) == ["MaxLengthCriteria", "EosTokenCriteria"]


@pytest.mark.parametrize("source", ["options", "config"])
def test_stop_strings(model, source):
    config = GenerationConfig(stop_strings=["a"]) if source == "config" else None
    options = {"stop_strings": "a"} if source == "options" else {}
    request = read(model, config, tokenizer=byte_tokenizer(), **options)
    assert "StopStringCriteria" in names(request.criteria)
    assert config is None or config.stop_strings == ["a"]
    with pytest.raises(InputError, match="stop strings need a tokenizer"):
        read(model, config, **options)


def test_the_caller_s_objects_stay_as_they_are(model):
    config, criteria = GenerationConfig(max_new_tokens=5, stop_strings=["a"]), StoppingCriteriaList()
    before = config.to_dict()
    options = {"temperature": 0.5, "stopping_criteria": criteria}
    interpret(model, PROMPT, config, byte_tokenizer(), options)
    assert config.to_dict() == before
    assert options == {"temperature": 0.5, "stopping_criteria": criteria}
    assert len(criteria) == 0


REFUSED = [
    ({"prompt": torch.cat([PROMPT, PROMPT])}, "one text at a time: got a batch of 2"),
    ({"prompt": torch.empty(1, 0, dtype=torch.long)}, "the prompt is empty; give at least one token"),
    ({"prompt": torch.empty(0, dtype=torch.long)}, "the prompt is empty; give at least one token"),
    ({"attention_mask": torch.tensor([[0, 0, *[1] * 8]])}, "hides some tokens"),
    ({"cache_implementation": "static"}, "cache_implementation is not supported"),
    ({"cache_implementation": "offloaded"}, "cache_implementation is not supported"),
    ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens is not supported"),
    ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha is not supported"),
    ({"dola_layers": "high"}, "dola_layers is not supported"),
    ({"guidance_scale": 2.0}, "guidance_scale is not supported"),
    ({"inputs_embeds": torch.zeros(1, 3, 40)}, "inputs_embeds is not supported"),
    ({"position_ids": torch.arange(3, 13)[None]}, "position_ids other than 0, 1, 2"),
    ({"output_scores": True, "return_dict_in_generate": True}, "output_scores is not supported"),
    ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions is not supported"),
    ({"num_beams": 2}, "num_beams=2 is not supported; only 1 is"),
    ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2 is not supported; only 1 is"),
    ({"config": GenerationConfig(num_beams=3)}, "num_beams=3 is not supported; only 1 is"),
    ({"assistant_model": tiny_model("llama", seed=3)}, "assistant_model is not supported"),
    ({"max_new_tokns": 3}, "max_new_tokns"),
    ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, not 0"),
    ({"max_new_tokens": -3}, "max_new_tokens must be a whole number of at least 1, not -3"),
    ({"max_length": 10}, "max_length"),
    ({"max_length": 4}, "max_length"),
    ({"temperature": -0.1, "do_sample": True}, "temperature must be a number of at least 0, not -0.1"),
    ({"config": GenerationConfig(top_p=2.0, do_sample=True)}, "top_p must be a number from 0 to 1, not 2.0"),
    ({"config": GenerationConfig(stop_strings=["a", ""])}, "a stop string is empty"),
    ({"stop": "a"}, "stop strings need a tokenizer"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=[words.split(":")[0] for _, words in REFUSED])
def test_refused(model, options, words):
    with pytest.raises(InputError) as error:
        read(model, **options)
    message = str(error.value)
    assert words in message
    assert "\n" not in message


def test_stop_strings_of_the_model(model):
    model.generation_config.stop_strings = ["a"]
    assert "StopStringCriteria" in names(read(model, tokenizer=byte_tokenizer()).criteria)
    assert model.generation_config.stop_strings == ["a"]
    with pytest.raises(InputError, match="stop strings need a tokenizer"):
        read(model)


@pytest.mark.parametrize("name", ["num_beams", "num_return_sequences"])
def test_beams_of_the_model(model, name):
    """Summarisers come with them in their generation config."""
    setattr(model.generation_config, name, 4)
    with pytest.raises(InputError, match=f"{name}=4 is not supported; only 1 is"):
        read(model)
    model.generation_config.do_sample = True  # transformers itself refuses several greedy answers
    with pytest.raises(InputError, match=f"{name}=4 is not supported; only 1 is"):
        model.generate(PROMPT, custom_generate=as_request)


def test_no_beams_instead_of_the_model_s(model):
    model.generation_config.num_beams = 4
    assert read(model, num_beams=1).max_new_tokens == DEFAULT_NEW_TOKENS
    assert read(model, GenerationConfig(num_beams=1)).max_new_tokens == DEFAULT_NEW_TOKENS


def test_ranges_of_the_model_s_own_defaults(model):
    """Where they are in use; those of sampling are not by greedy decoding."""
    model.generation_config.top_p, model.generation_config.do_sample = 2.0, True
    with pytest.raises(InputError, match="top_p must be a number from 0 to 1, not 2"):
        read(model)
    assert not read(model, temperature=0).do_sample


def test_no_stop_strings_instead_of_the_model_s(model):
    model.generation_config.stop_strings = ["a"]
    assert names(read(model, stop=[]).criteria) == ["MaxLengthCriteria"]
    assert names(read(model, GenerationConfig(stop_strings=[])).criteria) == ["MaxLengthCriteria"]


@pytest.mark.parametrize("source", ["options", "config", "model"])
@pytest.mark.parametrize("eos", [7, [7, 8], torch.tensor(7), torch.tensor([7, 8]), [torch.tensor(7), 8]], ids=repr)
def test_end_of_text_ids(model, source, eos):
    """As a number, a list, a tensor: from wherever they come."""
    config = GenerationConfig(eos_token_id=eos) if source == "config" else None
    if source == "model":
        model.generation_config.eos_token_id = eos
    request = read(model, config, **({"eos_token_id": eos} if source == "options" else {}))
    assert request.eos == ({7, 8} if "8" in repr(eos) else {7})
    assert [request.ending(torch.tensor(ids)) for ids in ([7, 5], [7, 5, 7])] == [None, "stop"]


def test_filled_cache_is_refused(model):
    past = DynamicCache()
    assert read(model, past_key_values=past).max_new_tokens == DEFAULT_NEW_TOKENS
    with torch.no_grad():
        model(PROMPT[:, :4], past_key_values=past, use_cache=True)
    with pytest.raises(InputError, match="a cache that holds tokens is not supported"):
        read(model, past_key_values=past)


def test_watermark_is_a_processor_like_others(model):
    assert names(read(model, watermarking_config=WatermarkingConfig()).processors) == ["WatermarkLogitsProcessor"]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "the prompt is empty"),
        ([[]], "the prompt is empty"),
        ([101], "token ids outside of the vocabulary of 101"),
        ([5, -1], "token ids outside of the vocabulary of 101"),
        ("text", "a text prompt needs a tokenizer"),
        ([[5, 6], [7, 8]], "a batch of 2"),
        ([[5, 6], [7]], "neither text nor one list of token ids"),
        (None, "neither text nor one list of token ids"),
        (["text"], "neither text nor one list of token ids"),
        ([[[5]]], "2D"),
        (torch.tensor(5), "token id"),
    ],
)
def test_prompts_refused_by_the_engine(shared_model, prompt, words):
    with pytest.raises(InputError, match=words):
        TriForce(shared_model).generate(prompt)


@pytest.mark.parametrize("prompt", ["", " ", "\n\t"])
def test_empty_text(prompt):
    with pytest.raises(InputError, match="the prompt is empty; give at least one word"):
        TriForce(tiny_model(vocab_size=259), byte_tokenizer()).generate(prompt)


@pytest.mark.parametrize("stops", [[5], [9], [9, 8], [3, 5]])
def test_stops(stops):
    """Asked after each token, about the text that ends with it."""
    request = Request(PROMPT[0], [], StoppingCriteriaList([EosTokenCriteria(stops)]), False, frozenset(stops), 5)
    ids = torch.tensor([3, 4, 5, 8, 4, 5, 7])
    endings = [request.ending(ids[:end]) for end in range(1, 8)]
    assert endings == ["stop" if int(token) in stops else None for token in ids]


def test_criteria_see_the_whole_text():
    seen = []

    def criterion(input_ids, scores, **kwargs):
        seen.append(input_ids.tolist())
        return torch.tensor([False])

    request = Request(PROMPT[0], [], StoppingCriteriaList([criterion]), False, frozenset(), 5)
    assert request.ending(torch.tensor([3, 4, 5, 8])) is None
    assert seen == [[[3, 4, 5, 8]]]


def test_processors_that_only_the_target_may_call(model):
    """Named in the statistics, and in a warning that says what would help; without drafts there is nothing to say."""

    def mine(input_ids, scores):
        return scores

    request = read(model, logits_processor=[mine], repetition_penalty=1.2)
    with pytest.warns(RuntimeWarning, match="drafts are made without mine: .* the answer is exact") as caught:
        assert request.target_only(Settings()) == ("mine",)
    assert "\n" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert request.target_only(Settings(gamma=0)) == ()
        assert read(model, logits_processor=[stateless(mine)], temperature=0.5).target_only(Settings()) == ()


def test_a_fork_that_is_none_is_refused_before_the_work(model):
    class Itself:
        def __call__(self, input_ids, scores):
            return scores

        def fork(self):
            return self

    with pytest.raises(InputError, match=r"Itself cannot be forked .its fork is itself."):
        read(model, logits_processor=[Itself()])
