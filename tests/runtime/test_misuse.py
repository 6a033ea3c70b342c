"""What would go wrong silently, or hang, if nobody refused it; and what must work although it is unusual."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessor, TemperatureLogitsWarper

from offload_triforce import InputError, TriForce, TriForceError, UnsupportedModelError
from tests.tiny import build, greedy, prompt_ids, tiny_model

SMALL = {"chunk": 4, "sink": 4, "recent": 16, "tile": 32, "budget": 64, "gamma": 4, "draft_cache": 64}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture
def engine(model):
    with TriForce(model, draft="none", **SMALL) as engine:
        yield engine


def test_gpt2_is_no_draft():
    """Its keys know their positions from the embeddings: none can be moved."""
    config = GPT2Config(vocab_size=101, n_layer=2, n_head=2, n_embd=48)
    with pytest.raises(TriForceError, match="cannot be a draft: it gives its keys positions in a way"):
        TriForce(GPT2LMHeadModel(config).eval(), draft="self")


@pytest.mark.parametrize(
    ("prefix", "changes", "feature"),
    [
        ("Qwen2Moe", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2}, "sliding window"),
        ("StableLm", {}, "does not hand keywords down"),
    ],
)
def test_models_that_would_decode_wrongly_are_refused(prefix, changes, feature):
    """A window that only the mask knows is invisible here, since no mask is built."""
    extra = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    target = build(prefix, **changes, **(extra if prefix == "Qwen2Moe" else {}))
    with pytest.raises(UnsupportedModelError, match=feature) as error:
        TriForce(target)
    assert "\n" not in str(error.value)


class Alternating(TemperatureLogitsWarper):
    """Looks at the prefix although its parent does not."""

    def __init__(self):
        super().__init__(1.0)

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, input_ids[0, -1] % 7 :: 7] += 3.0
        return scores


def test_a_subclass_of_a_rowwise_processor_sees_its_prefix(model):
    prompt = prompt_ids(60)
    expected = greedy(model, prompt, 40, logits_processor=[Alternating()])
    with TriForce(model, draft="self", **SMALL) as engine:
        result = engine.generate(prompt, max_new_tokens=40, do_sample=False, logits_processor=[Alternating()])
    assert result.token_ids == expected != greedy(model, prompt, 40)


def test_a_stream_ends_in_words_when_its_engine_is_closed(engine):
    begun, waiting = (engine.stream(prompt_ids(60), max_new_tokens=20, do_sample=False) for _ in range(2))
    with pytest.raises(InputError, match="given up"):  # the second request took the caches
        list(engine_tokens(begun))
    next(waiting._tokens)
    engine.close()
    with pytest.raises(InputError, match="given up"):
        list(engine_tokens(waiting))


def engine_tokens(stream):
    yield from stream._tokens


def test_a_longer_request_takes_the_caches_from_an_open_stream(engine):
    begun = engine.stream(prompt_ids(60), max_new_tokens=20, do_sample=False)
    first = next(begun._tokens)
    engine.stream(prompt_ids(300), max_new_tokens=20, do_sample=False)
    with pytest.raises(InputError, match="given up"):
        next(begun._tokens)
    assert first


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_length": 60}, "max_length"),
        ({"position_ids": torch.arange(5, 65)[None]}, "position_ids"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
        ({"inputs_embeds": torch.zeros(1, 60, 40)}, "inputs_embeds"),
        ({"temperature": -1.0, "do_sample": None}, "at least 0"),
    ],
)
def test_options_that_would_be_dropped_are_refused(engine, options, words):
    with pytest.raises(InputError, match=words) as error:
        engine.generate(prompt_ids(60), **{"do_sample": False, **options})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prompt", [[[1, 2], [3]], object(), [], torch.zeros(2, 5, dtype=torch.long), [1, 10**6], [-1]])
def test_prompts_that_are_none(engine, prompt):
    with pytest.raises(InputError):
        engine.generate(prompt, max_new_tokens=2)


@pytest.mark.parametrize("seed", [0, 2**40, 2**80])
def test_any_seed_is_repeatable(engine, seed):
    options = {"max_new_tokens": 12, "temperature": 1.0, "seed": seed}
    runs = [engine.generate(prompt_ids(60), **options).token_ids for _ in range(2)]
    assert runs[0] == runs[1]


def test_inside_inference_mode_and_out_of_it(model, engine):
    """The link's thread is not in inference mode, and the caches outlive the block."""
    expected = greedy(model, prompt_ids(150), 30)
    with torch.inference_mode():
        assert engine.generate(prompt_ids(150), max_new_tokens=30, do_sample=False).token_ids == expected
    assert engine.generate(prompt_ids(150), max_new_tokens=30, do_sample=False).token_ids == expected


def test_a_budget_larger_than_a_short_text_is_no_mistake(model):
    """A budget is set once, for the long texts; only against an explicit context it is checked."""
    with TriForce(model, draft="none", **{**SMALL, "budget": 4096}) as engine:
        result = engine.generate(prompt_ids(90), max_new_tokens=30, do_sample=False)
    assert result.token_ids == greedy(model, prompt_ids(90), 30)
    with pytest.raises(InputError, match="larger than the context"):
        TriForce(model, **{**SMALL, "budget": 4096}, context=1000)


def test_processors_that_fail_leave_the_model_as_it_was(model, engine):
    class Failing(LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise ZeroDivisionError

    before = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError):
        engine.generate(prompt_ids(60), max_new_tokens=5, do_sample=False, logits_processor=[Failing()])
    assert model.config._attn_implementation == before
    assert (
        greedy(model, prompt_ids(60), 5) == engine.generate(prompt_ids(60), max_new_tokens=5, do_sample=False).token_ids
    )
