"""Our attention is a thread's, not a model's: others see the model as it always was."""

import copy
import pickle
import threading
from functools import partial

import pytest
import torch
import transformers

from offload_triforce import TriForce, UnsupportedModelError
from offload_triforce.model import attach
from offload_triforce.model.adapter import ATTENTION_NAME, Attachment, attached
from tests.model.test_lock import raise_in_thread
from tests.tiny import greedy, prompt_ids, tiny_model

PROMPT, NEW = prompt_ids(150), 40
SMALL = {"budget": 48, "gamma": 4, "gamma1": 3, "chunk": 4, "sink": 4, "recent": 16, "tile": 16, "draft_cache": 64}
SMALL |= {"prefill_chunk": 64}


def name_of(model):
    return model.config._attn_implementation


def elsewhere(work):
    """What ``work`` returns on another thread."""
    results = []
    raise_in_thread(lambda: results.append(work()))
    return results[0]


def test_other_threads_see_the_model_as_it_was():
    model, other = tiny_model(), tiny_model("qwen3")
    other.set_attn_implementation("eager")
    with attached(model, other):
        assert name_of(model) == name_of(other) == ATTENTION_NAME
        assert elsewhere(lambda: (name_of(model), name_of(other))) == ("sdpa", "eager")
        assert vars(model.config)["_attn_implementation_internal"] == "sdpa"
        assert name_of(tiny_model("qwen2")) == "sdpa"  # a model that is not attached
        with attached(model):
            assert name_of(model) == ATTENTION_NAME
        assert name_of(model) == ATTENTION_NAME
    assert (name_of(model), name_of(other)) == ("sdpa", "eager")


def test_what_is_set_meanwhile_stays_set():
    """Nobody puts an old value back over a newer one."""
    model = tiny_model()
    with attached(model):
        elsewhere(lambda: model.set_attn_implementation("eager"))
        assert name_of(model) == ATTENTION_NAME
    assert name_of(model) == "eager"


def test_parts_of_a_model_keep_their_own_attention():
    """Text and images may run with different ones: neither is lost."""
    eyes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    eyes |= {"image_size": 28, "patch_size": 14}
    both = {"text_config": tiny_model("gemma3").config.to_dict(), "vision_config": eyes, "mm_tokens_per_image": 4}
    model = transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(**both)).eval()
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    parts = model.config.text_config, model.config.vision_config
    with attached(model):
        assert {part._attn_implementation for part in parts} == {ATTENTION_NAME}
    assert [part._attn_implementation for part in parts] == ["eager", "sdpa"]


def test_configurations_are_what_they_were():
    """Copies, pickles and dumps do not know of us, nor does a copy belong to what is attached."""
    model = tiny_model()
    plain = model.config.to_dict()
    with attached(model):
        twin = copy.deepcopy(model.config)
        assert twin._attn_implementation == "sdpa"
        assert model.config.to_dict() == plain
    assert pickle.loads(pickle.dumps(model.config)).to_dict() == plain
    twin._attn_implementation = "eager"
    assert (twin._attn_implementation, name_of(model)) == ("eager", "sdpa")


class WithItsOwn(transformers.LlamaConfig):
    @property
    def _attn_implementation(self):
        return self._attn_implementation_internal

    @_attn_implementation.setter
    def _attn_implementation(self, value):
        transformers.PretrainedConfig._attn_implementation.__set__(self, value)


def test_a_configuration_with_a_property_of_its_own():
    """HRM-Text has one."""
    config = WithItsOwn(**{k: v for k, v in tiny_model().config.to_dict().items() if k != "model_type"})
    model = transformers.LlamaForCausalLM(config).eval()
    with attached(model):
        assert name_of(model) == ATTENTION_NAME
    assert name_of(model) == "sdpa"


def test_a_version_that_asks_in_another_way_is_refused(monkeypatch):
    monkeypatch.setattr(attach, "_QUESTION", "_attention_of_the_future")
    monkeypatch.setattr(attach, "_answering", set())
    with pytest.raises(UnsupportedModelError, match="LlamaConfig has no _attention_of_the_future to be asked"):
        Attachment(tiny_model())


def test_compiled_models_do_not_notice():
    """torch.compile traces through the question."""
    model, prompt = tiny_model(), prompt_ids(20)
    Attachment(model)
    compiled = torch.compile(lambda ids: model(ids, use_cache=False).logits, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = model(prompt, use_cache=False).logits
        assert torch.equal(compiled(prompt), expected)
        with attached(model):
            other = elsewhere(torch.no_grad()(lambda: compiled(prompt)))
        assert torch.equal(other, expected)
        assert torch.equal(compiled(prompt), expected)


# Where another thread runs the model: in the middle of a layer, while the prefill records (no layer runs then, but the
# norm behind them does), and in the drafting. (module, calls before)
PLACES = [("layers.1.mlp", 2), ("norm", 0), ("layers.2.mlp", 40), ("layers.1.mlp", 12)]


@pytest.mark.parametrize(("place", "calls"), PLACES)
@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma2"])
def test_generate_in_another_thread_in_the_middle_of_a_step(family, place, calls):
    """Right for both, with masks (of sliding windows) and in eager attention; nothing waits for anything."""
    model = tiny_model(family, seed=1, calm=True)
    place = place if place != "layers.2.mlp" or len(model.model.layers) > 2 else "layers.1.mlp"
    expected, seen, count = greedy(model, PROMPT, NEW), [], 0
    mine = threading.current_thread()

    def hook(*_):
        nonlocal count
        if threading.current_thread() is mine:
            count += 1
            if count == calls + 1:
                seen.append(elsewhere(lambda: greedy(model, PROMPT, NEW)))

    with TriForce(model, draft="self", **SMALL) as engine:
        handle = model.model.get_submodule(place).register_forward_pre_hook(hook)
        try:
            answer = engine.generate(PROMPT, max_new_tokens=NEW, do_sample=False)
        finally:
            handle.remove()
    assert seen == [expected]
    assert answer.token_ids == expected


def test_a_callback_that_runs_the_model_in_the_middle_of_a_step_is_refused():
    """In the thread of the step the model is attached; another model is not, and a callback may run it."""
    model, other = tiny_model(), tiny_model("qwen2")
    expected = greedy(other, PROMPT, 3)

    def asks(wanted):
        def processor(ids, scores):
            assert greedy(wanted, PROMPT, 3) == expected
            return scores

        return processor

    with TriForce(model, draft="none", **SMALL) as engine:
        options = {"max_new_tokens": 3, "do_sample": False}
        with pytest.raises(UnsupportedModelError, match="by a callback in the middle of a step"):
            engine.generate(PROMPT, **options, logits_processor=[asks(model)])
        answer = engine.generate(PROMPT, **options, logits_processor=[asks(other)])
    assert answer.token_ids == greedy(model, PROMPT, 3)


def test_grad_mode_is_the_callers_again():
    model = tiny_model()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            Attachment(model).call(partial(torch.set_grad_enabled, not grad))
            assert torch.is_grad_enabled() == grad
