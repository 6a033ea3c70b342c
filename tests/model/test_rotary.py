"""Keys turned back are those of an earlier position, to the last bits, or the model is no draft."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from offload_triforce.errors import UnsupportedModelError
from offload_triforce.model.adapter import Attachment, run
from offload_triforce.model.rotary import KeyTurner, _KeyRecorder
from tests.tiny import disturbed, tiny_model

FAMILIES = ("llama", "gpt-oss", "qwen3-next", "gemma3", "phi3-longrope-below")


def keys_at(model, position):
    """Of a single token, which sees itself alone: [layers that attend, K, 1, D]."""
    view = _KeyRecorder()
    with torch.no_grad():
        Attachment(model, None).call(partial(partial(run, model, keep=1), [3], [position], view=view))
    return torch.stack([view.keys[layer] for layer in sorted(view.keys)])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("position", "back"), [(7, 7), (90, 64)])
def test_turned_back(family, position, back):
    model = disturbed(tiny_model(family), 0.05)
    turned, expected = KeyTurner(model).turn(keys_at(model, position), back), keys_at(model, position - back)
    assert (keys_at(model, position) - expected).abs().max() > 0.1 * expected.abs().max()
    torch.testing.assert_close(turned, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_model_that_turns_its_keys_otherwise_is_no_draft(monkeypatch):
    real = KeyTurner.turn
    monkeypatch.setattr(KeyTurner, "turn", lambda self, keys, back: real(self, keys, back + 1))
    with pytest.raises(UnsupportedModelError, match="cannot be a draft"):
        KeyTurner(disturbed(tiny_model("llama"), 0.05))
