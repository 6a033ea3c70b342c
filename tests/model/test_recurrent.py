"""Which function recurrent layers are computed by: installed kernels in a prefill, where they serve; trees by ours."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType

import pytest
import torch
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback

from offload_triforce import TriForce
from offload_triforce.kernels import ops
from offload_triforce.model import recurrent
from tests.tiny import RECURRENT, greedy, prompt_ids, tiny_model

PROMPT, CHUNK, NEW = 57, 20, 12
SMALL = {"budget": 24, "sink": 8, "recent": 8, "tile": 8, "prefill_chunk": CHUNK, "gamma": 3, "draft": "none"}


class Installed:
    """Stands in for the packages of kernels: notes what its functions are given, and answers as the model's own do.

    Parameters have the packages' names: transformers hands on no keywords but those that there are.
    """

    def __init__(self, rule, convolution):
        self.rules, self.convolutions = [], []
        self._rule, self._convolution = rule, convolution

    def chunk_gated_delta_rule(
        self,
        q,
        k,
        v,
        g,
        beta,
        scale=None,
        initial_state=None,
        output_final_state=False,
        use_qk_l2norm_in_kernel=False,
        cu_seqlens=None,
    ):
        self.rules.append(inspect.currentframe().f_locals.copy())
        return self._rule(
            q,
            k,
            v,
            g=g,
            beta=beta,
            initial_state=initial_state,
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        )

    def causal_conv1d_fn(self, x, weight, bias=None, seq_idx=None, activation=None):
        self.convolutions.append(x.shape)
        return self._convolution(x, weight, bias, activation=activation)


@pytest.fixture
def installed(request, monkeypatch):
    """A tiny hybrid of a family, and the kernels that transformers found when it read the family's code."""
    model = tiny_model(request.param)
    module = sys.modules[type(model).__module__]
    rule, convolution = (inspect.unwrap(getattr(module, name)) for name in (recurrent.RULE, recurrent.CONVOLUTION))
    kernels = Installed(rule, convolution)
    for path in ("fla", "fla.ops", "fla.ops.gated_delta_rule", "causal_conv1d"):
        monkeypatch.setitem(sys.modules, path, ModuleType(path))
    sys.modules["fla.ops.gated_delta_rule"].chunk_gated_delta_rule = kernels.chunk_gated_delta_rule
    sys.modules["causal_conv1d"].causal_conv1d_fn = kernels.causal_conv1d_fn
    found = use_kernel_func_from_hub_with_fallback
    monkeypatch.setattr(module, recurrent.RULE, found("chunk_gated_delta_rule", "fla")(rule))
    monkeypatch.setattr(module, recurrent.CONVOLUTION, found("causal_conv1d_fn", "causal_conv1d")(convolution))
    return model, kernels


def answer(model):
    with TriForce(model, **SMALL) as engine:
        return engine.generate(prompt_ids(PROMPT), max_new_tokens=NEW, do_sample=False)


@pytest.mark.parametrize("installed", sorted(RECURRENT), indirect=True)
def test_a_prefill_takes_installed_kernels_and_trees_do_not(installed, monkeypatch):
    model, kernels = installed
    expected = greedy(model, prompt_ids(PROMPT), NEW)
    monkeypatch.setattr(recurrent, "serves", lambda tokens: True)
    layers = [layer for layer in model.model.layers if hasattr(layer, "linear_attn")]
    trees, delta_tree = [], ops.delta_tree

    def counting(tokens, *others):
        trees.append(len(tokens.value))
        return delta_tree(tokens, *others)

    monkeypatch.setattr(ops, "delta_tree", counting)
    kernels.rules.clear(), kernels.convolutions.clear()
    result = answer(model)
    assert result.token_ids == expected
    assert trees
    # All of the prompt but its last token, chunk by chunk: the first without a state, each other with the one before.
    lengths = [CHUNK, CHUNK, PROMPT - 1 - 2 * CHUNK]
    part, taps = layers[0].linear_attn, layers[0].linear_attn.conv1d.weight.shape[-1]
    state = (1, part.num_v_heads, part.head_k_dim, part.head_v_dim)
    assert [given["v"].shape[1] for given in kernels.rules] == lengths * len(layers)
    assert [shape[2] for shape in kernels.convolutions] == [n + taps - 1 for n in lengths] * len(layers)
    for number, given in enumerate(kernels.rules):
        before, tokens = given["initial_state"], lengths[number % 3]
        assert (before is None) == (number % 3 == 0)
        assert before is None or (before.shape, before.dtype) == (state, torch.float32)
        assert given["v"].shape == (1, tokens, *state[1:2], state[3])
        assert given["q"].shape == given["k"].shape
        assert (given["k"].shape[3], given["g"].shape, given["beta"].shape) == (state[2], *[(1, tokens, state[1])] * 2)
        assert given["use_qk_l2norm_in_kernel"]
        assert given["output_final_state"]
        assert given["scale"] is given["cu_seqlens"] is None


@pytest.mark.parametrize("installed", ["qwen3.5"], indirect=True)
def test_where_they_do_not_serve_the_models_own_functions_are_taken(installed):
    """On the CPU, where the packages' kernels cannot run at all; and in float32, which they round."""
    model, kernels = installed
    expected = greedy(model, prompt_ids(PROMPT), NEW)
    assert kernels.rules, "transformers asks them, whatever the device"
    kernels.rules.clear(), kernels.convolutions.clear()
    assert answer(model).token_ids == expected
    assert not kernels.rules
    assert not kernels.convolutions
    assert [recurrent.serves(torch.zeros(1, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)] == [False] * 2


@pytest.mark.parametrize("installed", ["qwen3.5"], indirect=True)
def test_kernels_that_are_too_old_are_left_alone(installed, monkeypatch):
    """They count the key heads, and there may be more value heads."""
    model, kernels = installed
    expected = greedy(model, prompt_ids(PROMPT), NEW)
    monkeypatch.setattr(recurrent, "serves", lambda tokens: True)
    monkeypatch.setattr(recurrent, "too_old_fla", lambda: "0.4.1")
    kernels.rules.clear(), kernels.convolutions.clear()
    assert answer(model).token_ids == expected
    assert not kernels.rules
    assert kernels.convolutions, "of another package"


@pytest.mark.parametrize("installed", ["qwen3.5"], indirect=True)
def test_what_is_not_ours_goes_on_to_them(installed, monkeypatch):
    """The model's own steps, once its functions have been redirected: with a cache of its own, of any length."""
    model, kernels = installed
    for layer in model.model.layers:
        recurrent.redirect(layer)
    kernels.rules.clear()
    with torch.no_grad():
        model(prompt_ids(9))
    assert [given["v"].shape[1] for given in kernels.rules] == [9] * 3
