"""The accept/resample rule on its own, and distributions that are transformers' own, row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from speculation_toys import Walk, distribution_of
from transformers import LogitsProcessorList
from transformers.generation import (
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from offload_triforce.speculation.sampling import RandomChoices, Sampler, residual, verify


def rows(data, count, vocabulary):
    """Random distributions, some with zeros, [count, vocabulary] float64."""
    weights = st.lists(st.integers(0, 9), min_size=vocabulary, max_size=vocabulary).filter(any)
    drawn = torch.tensor(data.draw(st.lists(weights, min_size=count, max_size=count))).double()
    return drawn.reshape(count, vocabulary) / drawn.sum(-1, keepdim=True)


@settings(deadline=None)
@given(st.data(), st.integers(2, 5))
def test_one_guess_emits_p(data, vocabulary):
    """Summed by hand: q(x) min(1, p/q) + P(rejection) * residual, which is min(p, q) + max(p - q, 0) = p."""
    p, q = rows(data, 2, vocabulary), rows(data, 1, vocabulary)
    emitted = torch.zeros(vocabulary).double()
    for guess in range(vocabulary):
        if q[0, guess] == 0:
            continue
        for odds, (accepted, token) in outcomes([guess], q, p):
            emitted[guess if accepted else token] += q[0, guess] * odds
    assert torch.allclose(emitted, p[0], atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(st.data(), st.integers(2, 3), st.integers(0, 3))
def test_several_guesses_emit_p(data, vocabulary, guesses):
    """The joint distribution of what comes out: p where it was judged, nothing said about later tokens."""
    p, q = rows(data, guesses + 1, vocabulary), rows(data, guesses, vocabulary)

    def program(choices):
        drawn = [choices.draw(row) for row in q]
        accepted, token = verify(drawn, q, p, choices)
        return (*drawn[:accepted], token)

    # These rows do not depend on the tokens: continuing each text with p gives independent tokens.
    total = np.zeros((vocabulary,) * (guesses + 1))
    for out, probability in distribution_of(program).items():
        rest = np.array(probability)
        for row in p[len(out) :].numpy():
            rest = np.multiply.outer(rest, row)
        total[out] += rest
    expected = np.array(1.0)
    for row in p.numpy():
        expected = np.multiply.outer(expected, row)
    np.testing.assert_allclose(total, expected, atol=1e-12)


def outcomes(guesses, q, p):
    """Every (probability, result) of ``verify``."""
    return [(odds, out) for out, odds in distribution_of(lambda chance: verify(guesses, q, p, chance)).items()]


def test_without_guesses_the_token_is_ps():
    p = torch.tensor([[0.25, 0.75]])
    assert outcomes([], torch.empty(0), p) == [(0.25, (0, 0)), (0.75, (0, 1))]


def test_odds_are_per_guess():
    """The second guess is judged by the second rows, and what follows all guesses comes from the last."""
    p = torch.tensor([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]])
    q = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    assert {result: odds for odds, result in outcomes([0, 0], q, p)} == {(2, 0): 0.25, (1, 1): 0.75}


def test_an_impossible_guess_is_never_accepted():
    p, q = torch.tensor([[0.0, 1.0]] * 2), torch.tensor([[1.0, 0.0]])
    assert outcomes([0], q, p) == [(1.0, (0, 1))]


def test_residual_by_hand():
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.9, 0.05, 0.05])
    assert residual(p, q).tolist() == [0.0, 1.0, 0.0]
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([1.0, 0.0, 0.0])
    assert residual(p, q).tolist() == [0.0, 0.5, 0.5]


def test_residual_without_mass_is_p():
    """Equal distributions leave nothing over; a rejection that rounding made possible must still draw."""
    p = torch.tensor([0.3, 0.7])
    assert torch.equal(residual(p, p.clone()), p)


@settings(deadline=None)
@given(st.data(), st.integers(1, 6), st.floats(1e-8, 1e-6))
def test_residual_of_near_twins_is_a_distribution(data, vocabulary, noise):
    p = rows(data, 1, vocabulary)[0].float()
    q = p + noise * torch.linspace(-1, 1, vocabulary)
    rest = residual(p, q)
    assert bool((rest >= 0).all())
    assert float(rest.sum()) == pytest.approx(1, abs=1e-5)


def test_random_choices_repeat_with_their_seed():
    def record(seed):
        choices = RandomChoices(seed, torch.device("cpu"))
        row = torch.full((50,), 0.02)
        return [choices.draw(row) for _ in range(20)], [choices.accept(0.5) for _ in range(20)]

    assert record(7) == record(7)
    assert record(7)[0] != record(8)[0]
    assert record(7)[1] != record(8)[1]
    torch.manual_seed(0)
    first = record(7)
    torch.manual_seed(1)
    assert record(7) == first  # the global generator has no part in it


def test_random_choices_have_their_odds():
    choices = RandomChoices(0, torch.device("cpu"))
    tries = 4000
    assert sum(choices.accept(0.3) for _ in range(tries)) == pytest.approx(0.3 * tries, abs=150)
    assert sum(choices.draw(torch.tensor([0.7, 0.3])) for _ in range(tries)) == pytest.approx(0.3 * tries, abs=150)
    assert all(choices.accept(1.0) and not choices.accept(0.0) for _ in range(100))


def test_the_walk_visits_every_outcome_once():
    """The instrument itself: two coins and a draw, each with its probability."""

    def program(choices):
        return choices.accept(0.25), choices.draw(torch.tensor([0.5, 0.0, 0.5])), choices.accept(1.0)

    assert distribution_of(program) == {
        (False, 0, True): 0.375,
        (False, 2, True): 0.375,
        (True, 0, True): 0.125,
        (True, 2, True): 0.125,
    }
    assert Walk([]).accept(0.0) is False


VOCABULARY = 12
PROCESSORS = {
    "none": [],
    "temperature": [TemperatureLogitsWarper(0.6)],
    "top_k": [TopKLogitsWarper(3)],
    "top_p": [TemperatureLogitsWarper(0.8), TopPLogitsWarper(0.7)],
    "min_p": [MinPLogitsWarper(0.2)],
    "all of them": [
        TemperatureLogitsWarper(1.5),
        TopKLogitsWarper(8),
        TopPLogitsWarper(0.9),
        MinPLogitsWarper(0.1),
    ],
    "repetition penalty": [RepetitionPenaltyLogitsProcessor(1.8), TemperatureLogitsWarper(0.7)],
    "no_repeat_ngram": [NoRepeatNGramLogitsProcessor(2), TopPLogitsWarper(0.9)],
}


@pytest.fixture
def logits():
    return 3 * torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def prefix():
    """Few different tokens, so that penalties and n-gram bans differ from row to row."""
    return torch.tensor([1, 2, 3, 1, 2, 4, 1, 5, 2, 3])


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("name", PROCESSORS)
def test_rows_are_transformers_own(name, do_sample, logits, prefix):
    """Each row with its own prefix, as if it were generated alone."""
    processors = LogitsProcessorList(PROCESSORS[name])
    first = len(prefix) - len(logits) + 1
    got = Sampler(processors, do_sample, VOCABULARY).distributions(logits, prefix, first)
    for i, row in enumerate(logits):
        scores = processors(prefix[None, : first + i], row[None].clone())[0]
        best = torch.nn.functional.one_hot(scores.argmax(), VOCABULARY).float()
        expected = torch.softmax(scores, -1) if do_sample else best
        assert torch.equal(got[i], expected) if not do_sample else torch.allclose(got[i], expected, atol=1e-7)


@pytest.mark.parametrize("name", ["repetition penalty", "no_repeat_ngram"])
def test_the_prefix_matters(name, logits, prefix):
    """Guards the test above: with the first row's prefix for all, other distributions would come out."""
    processors = LogitsProcessorList(PROCESSORS[name])
    first = len(prefix) - len(logits) + 1
    sampler = Sampler(processors, True, VOCABULARY)
    shared = torch.cat([sampler.distributions(row[None], prefix, first) for row in logits])
    assert not torch.allclose(sampler.distributions(logits, prefix, first), shared, atol=1e-3)


def test_tokens_after_the_last_row_are_not_seen(logits, prefix):
    """The text may be longer than what is asked about."""
    sampler = Sampler(LogitsProcessorList(PROCESSORS["repetition penalty"]), True, VOCABULARY)
    longer = torch.cat([prefix, torch.tensor([9, 10, 11])])
    first = len(prefix) - len(logits) + 1
    assert torch.equal(sampler.distributions(logits, longer, first), sampler.distributions(logits, prefix, first))


def test_the_logits_stay_as_they_are(logits, prefix):
    """Processors may write into their scores; a level's logits are not theirs to change."""
    before = logits.clone()
    for name in PROCESSORS:
        Sampler(LogitsProcessorList(PROCESSORS[name]), True, VOCABULARY).distributions(logits, prefix, 6)
    assert torch.equal(logits, before)


def test_half_precision_logits_become_float32(logits, prefix):
    sampler = Sampler(LogitsProcessorList([TemperatureLogitsWarper(0.6)]), True, VOCABULARY)
    got = sampler.distributions(logits.bfloat16(), prefix, 6)
    assert got.dtype == torch.float32
    assert torch.allclose(got, torch.softmax(logits.bfloat16().float() / 0.6, -1), atol=1e-6)


@pytest.mark.parametrize("width", [VOCABULARY - 2, VOCABULARY + 3])
@pytest.mark.parametrize("do_sample", [True, False])
def test_logits_of_another_width(width, do_sample, prefix):
    """A draft with fewer padding tokens never guesses the missing ones; one with more never guesses those."""
    logits = torch.randn(2, width, generator=torch.Generator().manual_seed(1))
    logits[:, VOCABULARY:] = 50.0
    got = Sampler(LogitsProcessorList([TopKLogitsWarper(4)]), do_sample, VOCABULARY).distributions(logits, prefix, 9)
    assert got.shape == (2, VOCABULARY)
    assert bool((got[:, width:] == 0).all())
    assert torch.allclose(got.sum(-1), torch.ones(2))
    known = min(width, VOCABULARY)
    assert torch.equal(got.argmax(-1), logits[:, :known].argmax(-1))


def test_greedy_takes_the_first_of_equals(prefix):
    """As transformers' argmax does."""
    got = Sampler(LogitsProcessorList(), False, 4).distributions(torch.tensor([[0.0, 2.0, 2.0, 1.0]]), prefix, 10)
    assert got.tolist() == [[0.0, 1.0, 0.0, 0.0]]
