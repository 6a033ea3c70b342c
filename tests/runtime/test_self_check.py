"""A model of a family that nobody tried is compared with transformers' own attention before it is used."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from benchmarks.family_page import documented
from offload_triforce import TriForce, UnsupportedModelError
from offload_triforce.model.adapter import Attachment
from offload_triforce.model.layout import probe
from offload_triforce.model.tested import TESTED, is_tested
from offload_triforce.runtime import self_check
from offload_triforce.runtime.self_check import PARENTS, PROMPT, TOKENS, accept
from tests.tiny import _COMMON, FAMILIES, greedy, prompt_ids, tiny_model

SMALL = {"budget": 64, "chunk": 4, "sink": 4, "recent": 16, "tile": 16, "gamma": 4}
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class OddConfig(LlamaConfig):
    model_type = "odd_family"
    lie = "none"


def own_attention(module, query, key, value, attention_mask, scaling, **_):
    """As a family's own eager attention may be: it reads off the module what nobody hands on."""
    key, value = (repeat_kv(states, module.num_key_value_groups) for states in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    lie = module.config.lie
    if lie == "temperature":
        scores = scores * 1.3
    elif lie == "soft-capping":
        scores = 2 * (scores / 2).tanh()
    elif lie == "temperature by position":  # as Llama 4's, had it no other place for it
        places = torch.arange(key.shape[2], device=key.device)[-query.shape[2] :, None]
        scores = scores * (1 + (1 + places / 16).floor().log())
    elif lie == "bias":  # of distance: ALiBi
        places = torch.arange(key.shape[2], device=key.device)
        scores = scores - 0.2 * (places[-query.shape[2] :, None] - places).abs()
    elif lie in ("chunks", "window"):  # of 24 tokens, which nobody is told of
        places = torch.arange(key.shape[2], device=key.device)
        newest = places[-query.shape[2] :, None]
        seen = newest // 24 == places // 24 if lie == "chunks" else newest - places < 24
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if attention_mask is not None and lie != "first tokens":
        scores = scores + attention_mask
    elif lie == "first tokens":  # a prefix that is seen by all, later tokens too
        seen = torch.ones_like(scores, dtype=torch.bool).tril()
        seen[..., :10] = True
        scores = scores.masked_fill(~seen, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), None


class OddAttention(nn.Module):
    """Llama's, with an attention function of its own: what it tells others' is right as far as it goes."""

    def __init__(self, own):
        super().__init__()
        self.__dict__.update({name: value for name, value in vars(own).items() if not name.startswith("_")})
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = own.q_proj, own.k_proj, own.v_proj, own.o_proj

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            layer(hidden_states).view(shape).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, own_attention)
        output, weights = interface(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


def odd_model(lie="none", dtype=torch.float32):
    torch.manual_seed(0)
    config = OddConfig(**_COMMON)
    config.lie = lie
    model = LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.self_attn = OddAttention(layer.self_attn)
    return model.to(dtype)


LIES = ["temperature", "soft-capping", "temperature by position", "bias", "chunks", "window", "first tokens"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lie", LIES)
def test_a_family_that_does_not_say_how_it_attends_is_refused(lie, dtype):
    model = odd_model(lie, dtype)
    probe(model)  # it looks right
    with pytest.raises(UnsupportedModelError, match=r"of no family that was tried \(odd_family\).*--no-check") as found:
        TriForce(model, **SMALL)
    assert "\n" not in str(found.value)
    TriForce(model, **SMALL, check=False).close()


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_honest_family_that_nobody_tried_is_taken(dtype):
    model, prompt = odd_model(dtype=dtype), prompt_ids(100)
    assert not is_tested(model)
    with TriForce(model, **SMALL) as engine:
        answer = engine.generate(prompt, max_new_tokens=20, do_sample=False).token_ids
    if dtype == torch.float32:
        model.set_attn_implementation("eager")
        assert answer == greedy(model, prompt, 20, use_cache=False)


def test_what_the_check_is_for():
    """Without it the text is another one, and nothing says so."""
    model, prompt = odd_model("temperature"), prompt_ids(100)
    with TriForce(model, **SMALL, check=False) as engine:
        answer = engine.generate(prompt, max_new_tokens=20, do_sample=False).token_ids
    model.set_attn_implementation("eager")
    assert answer != greedy(model, prompt, 20, use_cache=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_right_for_every_kind_of_layer(family, monkeypatch):
    """In fp32 a twentieth of what is allowed: with windows, experts, sinks and recurrent states."""
    monkeypatch.setattr(self_check, "is_tested", lambda model: False)
    monkeypatch.setattr(self_check, "EXACT", self_check.EXACT / 20)
    accept(tiny_model(family))
    accept(tiny_model(family, calm=True).to(torch.bfloat16))


def test_a_model_is_checked_once(monkeypatch):
    asked = []
    call = Attachment.call
    monkeypatch.setattr(Attachment, "call", lambda self, *given: (asked.append(self.name), call(self, *given))[1])
    model = odd_model()
    for _ in range(3):
        TriForce(model, **SMALL).close()
    assert asked.count("eager") == 1
    asked.clear()
    TriForce(tiny_model(), **SMALL).close()
    assert "eager" not in asked  # tested


def test_a_patched_module_is_no_tested_one():
    model = tiny_model()
    assert is_tested(model)
    attention = model.model.layers[1].self_attn
    attention.forward = lambda *args, own=attention.forward, **kwargs: own(*args, **kwargs)
    assert not is_tested(model)
    accept(model)
    model._hf_hook = attention._hf_hook = None  # as accelerate marks what it hooks into
    assert is_tested(model)


def test_a_family_that_numbers_its_tokens_otherwise_is_refused():
    """As models with eyes may: only where nobody tells them positions does that show."""
    accept(odd_model())
    model = odd_model()

    def doubled(*args, position_ids=None, own=model.model.forward, **kwargs):
        if position_ids is None:
            position_ids = 2 * torch.arange(kwargs["input_ids"].shape[1])[None]
        return own(*args, position_ids=position_ids, **kwargs)

    model.model.forward = doubled
    with pytest.raises(UnsupportedModelError, match="differ"):
        accept(model)


def test_what_cannot_be_compared_is_said():
    model = odd_model()
    own = model.model.rotary_emb.forward

    def failing(states, position_ids):
        if model.config._attn_implementation == "eager":
            raise ValueError("not with this attention")
        return own(states, position_ids)

    model.model.rotary_emb.forward = failing
    with pytest.raises(UnsupportedModelError, match=r"could not be checked .*not with this attention.*--no-check"):
        accept(model)


def test_logits_that_are_no_numbers_are_not_the_same():
    model = odd_model()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(UnsupportedModelError, match="differ"):
        accept(model)


def test_the_tree_has_paths_that_part():
    assert len(PARENTS) + 1 + PROMPT == TOKENS == 64
    leaves = set(range(len(PARENTS) + 1)) - set(PARENTS)
    assert len(leaves) == 3
    assert all(parent <= node for node, parent in enumerate(PARENTS))


def test_the_list_is_that_of_the_page():
    running, _ = documented(PAGE.read_text())
    assert running == TESTED
