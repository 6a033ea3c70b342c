"""The whole runtime on the Triton kernels, as on CUDA: through the interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from offload_triforce import Settings, TriForce
from offload_triforce.kernels import ops
from offload_triforce.model.layout import probe
from tests.runtime.test_pipeline_exact import SETTINGS, assert_same, logits
from tests.scheduler.devices import EagerDevice, chaotic
from tests.tiny import greedy, prompt_ids, tiny_model

pytest.importorskip("triton")
PROMPT = prompt_ids(40)[0]
FEW = Settings(**{**vars(SETTINGS), "tile": 12})  # two tiles of each layer: the interpreter is slow
WHERE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def triton_kernels(monkeypatch):
    monkeypatch.setenv("OFFLOAD_TRIFORCE_KERNELS", "triton")
    assert ops.uses_triton(torch.zeros(1, device=WHERE))


@pytest.mark.parametrize(
    "family",
    ["gemma2", "qwen3.5", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "qwen2-sliding"))],
)
def test_passes_agree_with_the_eager_twins(family, monkeypatch):
    """Same logits, same keys and values, same choice of chunks - up to what rounding may turn."""
    model = tiny_model(family).to(WHERE)
    layout = probe(model)
    ours, kept, chosen = logits(model, layout, EagerDevice(WHERE), PROMPT, 2, FEW)
    monkeypatch.setenv("OFFLOAD_TRIFORCE_KERNELS", "torch")
    theirs, expected, choice = logits(model, layout, EagerDevice(WHERE), PROMPT, 2, FEW)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    for one, other in zip(kept, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(chosen, choice, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(WHERE == "cuda", reason="threads that compute are for the CPU")
def test_bit_identical_under_delays():
    """The kernels' state is carried from tile to tile on another thread, late, and comes out the same."""
    model = tiny_model("llama", num_hidden_layers=2)
    layout = probe(model)
    expected = logits(model, layout, EagerDevice(), PROMPT, 2, FEW)
    assert_same(logits(model, layout, chaotic(7), PROMPT, 2, FEW), expected)


@pytest.mark.parametrize("draft", ["self"])
def test_greedy_equals_transformers(draft):
    model, prompt = tiny_model("llama", calm=True).to(WHERE), prompt_ids(30).to(WHERE)
    with TriForce(model, draft=draft, **{**vars(FEW), "draft_cache": 32}) as engine:
        answer = engine.generate(prompt, max_new_tokens=5, do_sample=False)
    assert answer.token_ids == greedy(model, prompt, 5)
