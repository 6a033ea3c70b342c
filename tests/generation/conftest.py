"""A model, an engine of it, and what it says."""

import pytest

from offload_triforce import TriForce
from tests.generation.turns import NEW, PROMPT, SMALL
from tests.tiny import greedy, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", seed=1, calm=True)


@pytest.fixture(scope="module")
def expected(model):
    return greedy(model, PROMPT, NEW)


@pytest.fixture
def engine(model):
    with TriForce(model, draft="self", reuse=False, **SMALL) as engine:  # each answer with its prefill
        yield engine
