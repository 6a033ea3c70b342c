"""``model.generate(..., custom_generate=triforce_generate)``: same arguments, same answer, and the model as it was."""

import threading

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TextIteratorStreamer,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from offload_triforce import InputError, Settings, TriForce, UnsupportedModelError, triforce_generate
from tests.byte_tokenizer import byte_tokenizer
from tests.tiny import build, disturbed, prompt_ids, tiny_model

PROMPT, NEW = prompt_ids(150), 32
SETTINGS = Settings(budget=48, gamma=4, gamma1=3, chunk=4, sink=4, recent=16, tile=16, draft_cache=64)


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen2", calm=True)


def both(model, prompt=PROMPT, ours=None, **options):
    """The answers of transformers and of ours to the same call; ``ours``: keywords of our own."""
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    settings = {"triforce_settings": SETTINGS, **(ours or {})}
    expected = model.generate(prompt, **options)
    return expected, model.generate(prompt, **options, custom_generate=triforce_generate, **settings)


@pytest.mark.parametrize("draft", ["ngram", "self", "none", "model"])
def test_greedy(model, draft):
    draft = disturbed(model, 0.03) if draft == "model" else draft
    expected, sequences = both(model, ours={"triforce_draft": draft})
    assert sequences.dtype == torch.long
    assert torch.equal(sequences, expected)
    assert len(set(sequences[0, 150:].tolist())) > 5


def test_an_engine_goes_on_from_call_to_call(model):
    with TriForce(model, settings=SETTINGS) as engine:
        expected, first = both(model, ours={"triforce_engine": engine})
        assert torch.equal(first, expected)
        options = {"max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True}
        output = model.generate(first, **options, custom_generate=triforce_generate, triforce_engine=engine)
        assert output.triforce_stats.reused_tokens == first.shape[1] - 1
        assert torch.equal(output.sequences, model.generate(first, **options).sequences)
    with TriForce(tiny_model("qwen2", seed=3)) as other, pytest.raises(InputError, match="another model"):
        both(model, ours={"triforce_engine": other})


def test_without_settings(model):
    """The defaults are made for long texts; short ones work all the same."""
    expected = model.generate(PROMPT[:, :20], max_new_tokens=8, do_sample=False)
    answer = model.generate(PROMPT[:, :20], max_new_tokens=8, do_sample=False, custom_generate=triforce_generate)
    assert torch.equal(answer, expected)


def favour_small(input_ids, scores):
    return scores - 0.02 * torch.arange(scores.shape[1])


class SumOfTokens(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.sum(dim=1) % 23 == 0


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"logits_processor": [favour_small]},
        {"stopping_criteria": [SumOfTokens()]},
        {"no_repeat_ngram_size": 2, "logits_processor": [favour_small], "stopping_criteria": [SumOfTokens()]},
        {"generation_config": GenerationConfig(max_new_tokens=30, repetition_penalty=1.2, eos_token_id=[50, 60, 70])},
        {"use_cache": False},
        {"attention_mask": torch.ones_like(PROMPT)},
    ],
    ids=lambda options: " ".join(options),
)
def test_arguments_of_generate(model, options):
    expected, sequences = both(model, **options)
    assert torch.equal(sequences, expected)


def test_arguments_do_something(model):
    """Else the test above would be empty."""
    plain = both(model)[0]
    for options in ({"repetition_penalty": 1.3}, {"logits_processor": [favour_small]}):
        assert not torch.equal(both(model, **options)[0], plain)
    assert both(model, stopping_criteria=[SumOfTokens()])[0].shape[1] < plain.shape[1]


def test_model_defaults(model, monkeypatch):
    defaults = GenerationConfig(repetition_penalty=1.2, do_sample=True, temperature=0.7, max_new_tokens=25)
    monkeypatch.setattr(model, "generation_config", defaults)
    expected = model.generate(PROMPT, do_sample=False)
    assert expected.shape[1] == 175
    ours = model.generate(
        PROMPT, do_sample=False, custom_generate=triforce_generate, triforce_settings=SETTINGS, triforce_draft="self"
    )
    assert torch.equal(ours, expected)


def test_return_dict(model):
    expected, output = both(model, return_dict_in_generate=True)
    assert isinstance(output, GenerateDecoderOnlyOutput)
    assert torch.equal(output.sequences, expected.sequences)
    stats = output.triforce_stats
    assert (stats.prompt_tokens, stats.new_tokens) == (150, NEW)
    assert stats.passes < NEW
    assert not stats.interrupted


def test_settings_arrive(model):
    def output(**settings):
        return model.generate(
            PROMPT,
            max_new_tokens=40,
            do_sample=False,
            custom_generate=triforce_generate,
            triforce_settings=Settings(**settings, chunk=4, sink=4, recent=16, tile=16, draft_cache=64, budget=48),
            return_dict_in_generate=True,
        ).triforce_stats

    plain, resident = output(gamma=0, link_gbps=1000.0), output(gamma=5, resident=1.0, draft_cost=0.05)
    assert plain.passes == 40
    assert plain.retrieval.proposed == 0
    assert resident.passes < 40
    assert plain.link_bytes > resident.link_bytes == 0


class Recorder(BaseStreamer):
    def __init__(self):
        self.seen, self.ended = [], 0

    def put(self, value):
        self.seen.append(value.tolist())

    def end(self):
        self.ended += 1


def test_streamer(model):
    streamer = Recorder()
    _, sequences = both(model, ours={"triforce_streamer": streamer})
    assert streamer.seen == [PROMPT.tolist(), *([token] for token in sequences[0, 150:].tolist())]
    assert streamer.ended == 1


def test_streamer_of_generate(model):
    """``generate`` shows it the prompt and then forgets it: ours goes on from there, as transformers does."""
    ours, theirs = Recorder(), Recorder()
    options = {"max_new_tokens": 20, "do_sample": False}
    model.generate(PROMPT, **options, streamer=theirs)
    model.generate(PROMPT, **options, streamer=ours, custom_generate=triforce_generate, triforce_settings=SETTINGS)
    assert ours.seen == theirs.seen
    assert ours.ended == theirs.ended == 1


def test_streamer_by_both_names(model):
    with pytest.raises(InputError, match="streamer and triforce_streamer are the same; give one of them"):
        both(model, streamer=Recorder(), ours={"triforce_streamer": Recorder()})


def test_streamer_of_some_other_caller(model):
    """Only that of ``generate`` counts, not a variable that happens to have the name."""
    streamer = Recorder()
    config, stop = GenerationConfig(max_length=155), StoppingCriteriaList([MaxLengthCriteria(155)])
    sequences = triforce_generate(model, PROMPT, LogitsProcessorList(), stop, config, triforce_settings=SETTINGS)
    assert sequences.shape[1] == 155
    assert streamer.seen == []


@pytest.mark.parametrize("name", ["streamer", "triforce_streamer"])
def test_text_iterator_streamer(name):
    """As people use it: generate in a thread, read in another. It ends, since ours calls end()."""
    model, tokenizer = tiny_model("qwen2", calm=True, vocab_size=259), byte_tokenizer()
    prompt = tokenizer("It was the best of times, it was the worst of times", return_tensors="pt").input_ids
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    options = {"max_new_tokens": 30, "do_sample": False}
    ours = {"custom_generate": triforce_generate, "triforce_settings": SETTINGS, name: streamer}
    thread = threading.Thread(target=lambda: model.generate(prompt, **options, **ours))
    thread.start()
    pieces = list(streamer)
    thread.join()
    answer = model.generate(prompt, **options)[0, prompt.shape[1] :]
    assert "".join(pieces) == tokenizer.decode(answer, clean_up_tokenization_spaces=False)


def sample(model, **ours):
    options = {"max_new_tokens": 40, "do_sample": True, "temperature": 1.2, "top_k": 0}
    return model.generate(PROMPT, **options, custom_generate=triforce_generate, triforce_settings=SETTINGS, **ours)


def test_seed(model):
    first, again, other = (sample(model, triforce_seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_torch_s_own_seed(model):
    """Without a seed of ours, the global generator decides, as it does for transformers."""
    answers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        answers.append(sample(model))
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], answers[2])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_model_is_left_as_it_was(model, implementation):
    model.set_attn_implementation(implementation)
    expected, sequences = both(model)
    assert torch.equal(sequences, expected)
    assert model.config._attn_implementation == implementation
    assert torch.equal(model.generate(PROMPT, max_new_tokens=NEW, do_sample=False), expected)
    assert not any("forward" in vars(module) for module in model.modules())
    model.set_attn_implementation("sdpa")


class Broken(Exception):
    pass


@pytest.mark.parametrize("calls", [1, 7])
def test_model_is_left_as_it_was_after_an_exception(model, calls):
    count = 0

    def breaks(input_ids, scores):
        nonlocal count
        count += 1
        if count == calls:
            raise Broken
        return scores

    options = {"max_new_tokens": 20, "do_sample": False}
    ours = {"custom_generate": triforce_generate, "triforce_settings": SETTINGS}
    expected, streamer = model.generate(PROMPT, **options), Recorder()
    with pytest.raises(Broken):
        model.generate(PROMPT, **options, **ours, triforce_streamer=streamer, logits_processor=[breaks])
    assert streamer.ended == 1
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model.generate(PROMPT, **options), expected)
    assert torch.equal(model.generate(PROMPT, **options, **ours), expected)


def test_stop_strings():
    """generate() drops the tokenizer for callables and then asks for it: a criterion does what the option would."""
    model, tokenizer = tiny_model("qwen2", vocab_size=259), byte_tokenizer()
    plain = model.generate(PROMPT, max_new_tokens=NEW, do_sample=False)[0, 150:]
    stop = next(s for i in range(10, NEW - 4) if len(s := tokenizer.decode(plain[i : i + 1])) == 1 and s.isascii())
    expected = model.generate(PROMPT, max_new_tokens=NEW, do_sample=False, stop_strings=[stop], tokenizer=tokenizer)
    same, sequences = both(model, stopping_criteria=[StopStringCriteria(tokenizer, [stop])])
    assert torch.equal(same, expected)
    assert torch.equal(sequences, expected)
    assert sequences.shape[1] < 150 + NEW
    with pytest.raises(ValueError, match="could not locate a tokenizer"):
        both(model, stop_strings=[stop], tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        (torch.cat([PROMPT, PROMPT]), {}, "one text at a time: got a batch of 2"),
        (PROMPT, {"attention_mask": torch.tensor([[0] * 50 + [1] * 100])}, "hides some tokens"),
        (PROMPT, {"cache_implementation": "static"}, "cache_implementation is not supported"),
        (PROMPT, {"guidance_scale": 1.5}, "guidance_scale is not supported"),
        (PROMPT, {"num_beams": 2}, "num_beams=2 is not supported; only 1 is"),
        (PROMPT, {"generation_config": GenerationConfig(num_beams=2)}, "num_beams=2 is not supported; only 1 is"),
        (PROMPT, {"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2 is not supported"),
        (PROMPT, {"top_p": 2.0, "do_sample": True}, "top_p must be a number from 0 to 1, not 2"),
        (PROMPT, {"output_scores": True}, "output_scores is not supported"),
    ],
)
def test_refused(model, prompt, options, words):
    options = {"max_new_tokens": 5, "custom_generate": triforce_generate, **options}
    with pytest.raises(InputError, match=words):
        model.generate(prompt, **options)
    assert model.config._attn_implementation == "sdpa"


def test_unsupported_model():
    model = build("Llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(UnsupportedModelError, match="dynamic NTK"):
        model.generate(PROMPT, max_new_tokens=5, custom_generate=triforce_generate)
    assert model.generate(PROMPT, max_new_tokens=5).shape[1] == 155
