"""Every causal language model of transformers: what planning refuses, loading refuses in the same words."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers

from benchmarks.family_page import documented
from benchmarks.tiny_families import UNMADE, model_types, tiny_config, whole_model
from offload_triforce.errors import TriForceError
from offload_triforce.model import blank
from offload_triforce.model.blank import layout_of
from offload_triforce.model.layout import ModelLayout, probe
from offload_triforce.model.refusals import class_name
from offload_triforce.model.shape import shape_of

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
NEWEST = "5.24"  # what the page was written with
TYPES = model_types()
# The probe of a model that is there, for every eighth in the normal run.
LOADED = [pytest.param(kind, marks=pytest.mark.slow if i % 8 else ()) for i, kind in enumerate(TYPES)]


def config_of(model_type):
    try:
        return tiny_config(model_type)
    except Exception as error:  # some releases make no default configuration of some families
        if transformers.__version__ >= NEWEST and model_type not in UNMADE:
            raise
        pytest.skip(f"transformers {transformers.__version__} makes no such configuration: {error}")


def outcome(what, *given):
    """A layout wherever it is, or the sentence; anything but a TriForceError is let through."""
    try:
        return replace(what(*given), device=None)
    except TriForceError as error:
        message = str(error)
        assert message
        assert "\n" not in message
        return message


@cache
def planned(model_type):
    return outcome(layout_of, config_of(model_type), torch.float32)


@pytest.mark.parametrize("model_type", TYPES)
def test_planned_or_refused(model_type):
    """Without weights: quick enough for all of them."""
    found = planned(model_type)
    if isinstance(found, str):
        assert "NoneType" not in found
        assert class_name(config_of(model_type)) in found
        return
    shape = shape_of(config_of(model_type), torch.float32)
    assert replace(shape.layout, device=None) == found
    assert shape.weights.total == 4 * shape.weights.parameters
    assert shape.heads % found.attention[0].kv_heads == 0


@pytest.mark.parametrize("model_type", LOADED)
def test_planning_and_loading_agree(model_type):
    try:
        model = whole_model(config_of(model_type), dtype=torch.float32)
    except (ImportError, RuntimeError, AttributeError, TypeError, ValueError, AssertionError, ZeroDivisionError):
        assert isinstance(planned(model_type), str)  # nothing is promised of a model that transformers does not make
        return
    assert planned(model_type) == outcome(probe, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "granitemoe", "glm4_moe"])
def test_experts_are_planned_without_weights(model_type, dtype, monkeypatch):
    """Weights made of one zero are for those who need some: with large experts they would take long."""
    monkeypatch.setattr(blank, "_give_zeros", None)
    assert layout_of(config_of(model_type), dtype).dtype == dtype


def test_the_page_says_what_is_so():
    """Of the families that are in it and here: those that run are accepted, the others are refused."""
    running, refused = documented(PAGE.read_text())
    assert not running & refused
    if transformers.__version__.startswith(NEWEST):
        assert running | refused == set(TYPES)
    wrong = []
    for model_type in sorted((running | refused) & set(TYPES)):
        try:
            accepted = isinstance(planned(model_type), ModelLayout)
        except pytest.skip.Exception:
            continue
        newer = transformers.__version__ < NEWEST and not accepted  # older releases may have to be refused
        if accepted != (model_type in running) and not newer:
            wrong.append(model_type)
    assert not wrong
