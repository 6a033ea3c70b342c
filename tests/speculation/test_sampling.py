"""The accept/resample rule on its own, and distributions that are transformers' own, row by row."""

from __future__ import annotations

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

from offload_triforce.speculation.sampling import RandomChoices, Sampler, accept_one, residual, without


def rows(data, count, vocabulary):
    """Random distributions, some with zeros, [count, vocabulary] float64."""
    weights = st.lists(st.integers(0, 9), min_size=vocabulary, max_size=vocabulary).filter(any)
    drawn = torch.tensor(data.draw(st.lists(weights, min_size=count, max_size=count))).double()
    return drawn.reshape(count, vocabulary) / drawn.sum(-1, keepdim=True)


def draws(q, count, choices):
    """Tokens drawn one after the other without replacement: fewer if there are no more."""
    taken = []
    while len(taken) < count and bool(q.sum() > 0):
        taken.append(choices.draw(q))
        q = without(q, taken[-1])
    return taken


@settings(deadline=None)
@given(st.data(), st.integers(2, 5))
def test_one_candidate_emits_p(data, vocabulary):
    """Summed by hand: q(x) min(1, p/q) + P(rejection) * residual, which is min(p, q) + max(p - q, 0) = p."""
    (p,), (q,) = rows(data, 1, vocabulary), rows(data, 1, vocabulary)
    emitted = torch.zeros(vocabulary).double()
    for guess in range(vocabulary):
        if q[guess] > 0:
            for token, odds in outcomes([guess], q, p).items():
                emitted[token] += q[guess] * odds
    assert torch.allclose(emitted, p, atol=1e-12)


@settings(deadline=None, max_examples=150)
@given(st.data(), st.integers(2, 4), st.integers(0, 4))
def test_several_candidates_emit_p(data, vocabulary, count):
    """Drawn without replacement, some of the judge's tokens among them or none."""
    (p,), (q,) = rows(data, 1, vocabulary), rows(data, 1, vocabulary)
    total = distribution_of(lambda choices: accept_one(p, q, draws(q, count, choices), choices))
    emitted = torch.tensor([total.get(token, 0.0) for token in range(vocabulary)], dtype=torch.float64)
    assert torch.allclose(emitted, p, atol=1e-12)


def outcomes(tokens, q, p):
    """Probability of each token that ``accept_one`` may give."""
    return distribution_of(lambda choices: accept_one(p, q, tokens, choices))


def test_without_candidates_the_token_is_ps():
    p = torch.tensor([0.25, 0.75])
    assert outcomes([], p, p) == {0: 0.25, 1: 0.75}


def test_more_candidates_are_accepted_more_often():
    p, q = torch.tensor([0.2, 0.3, 0.5]).double(), torch.tensor([0.6, 0.3, 0.1]).double()

    def accepted(count):
        def program(choices):
            tokens = draws(q, count, choices)
            return accept_one(p, q, tokens, choices) in tokens

        return distribution_of(program)[True]

    assert accepted(1) == pytest.approx(float(torch.minimum(p, q).sum()))
    assert accepted(1) < accepted(2) < accepted(3)
    assert accepted(3) == pytest.approx(1.0)


def test_an_impossible_candidate_is_never_accepted():
    p, q = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    assert outcomes([0], q, p) == {1: 1.0}


def test_without_by_hand():
    q = torch.tensor([0.5, 0.25, 0.25])
    assert without(q, 0).tolist() == [0.0, 0.5, 0.5]
    assert q.tolist() == [0.5, 0.25, 0.25]
    assert without(torch.tensor([0.0, 1.0]), 1).tolist() == [0.0, 0.0]


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


def prefixes_of(prefix, count):
    """The last ``count`` beginnings of a text, the whole one included."""
    return [lambda device, n=n: prefix[: len(prefix) - count + 1 + n] for n in range(count)]


def scores_of(name, logits, prefix, vocabulary=VOCABULARY):
    processors = LogitsProcessorList(PROCESSORS[name])
    return Sampler(processors, True, vocabulary).scores(logits, prefixes_of(prefix, len(logits)))


@pytest.mark.parametrize("name", PROCESSORS)
def test_rows_are_transformers_own(name, logits, prefix):
    """Each row with its own prefix, as if it were generated alone."""
    got = scores_of(name, logits, prefix)
    for row, ids, scores in zip(logits, prefixes_of(prefix, len(logits)), got, strict=True):
        expected = LogitsProcessorList(PROCESSORS[name])(ids(logits.device)[None], row[None].clone())[0]
        assert torch.equal(scores, expected)


@pytest.mark.parametrize("name", ["repetition penalty", "no_repeat_ngram"])
def test_the_prefix_matters(name, logits, prefix):
    """Guards the test above: with the first row's prefix for all, other distributions would come out."""
    shared = torch.cat([scores_of(name, row[None], prefix[: len(prefix) - len(logits) + 1]) for row in logits])
    assert not torch.allclose(scores_of(name, logits, prefix), shared, atol=1e-3)


@pytest.mark.parametrize("name", PROCESSORS)
def test_prefixes_are_made_only_where_they_are_looked_at(name, logits):
    """Making them costs time, and bringing them to the device does."""
    made = []
    prefixes = [lambda device: made.append(1) or torch.tensor([1, 2])] * len(logits)
    Sampler(LogitsProcessorList(PROCESSORS[name]), True, VOCABULARY).scores(logits, prefixes)
    assert bool(made) == (name in ("repetition penalty", "no_repeat_ngram"))


def test_the_logits_stay_as_they_are(logits, prefix):
    """Processors may write into their scores; a level's logits are not theirs to change."""
    before = logits.clone()
    for name in PROCESSORS:
        scores_of(name, logits, prefix)
    assert torch.equal(logits, before)


def test_half_precision_logits_become_float32(logits, prefix):
    got = scores_of("temperature", logits.bfloat16(), prefix)
    assert got.dtype == torch.float32
    assert torch.equal(got, logits.bfloat16().float() / 0.6)


@pytest.mark.parametrize("width", [VOCABULARY - 2, VOCABULARY + 3])
def test_logits_of_another_width(width, prefix):
    """A draft with fewer padding tokens never guesses the missing ones; one with more never guesses those."""
    logits = torch.randn(2, width, generator=torch.Generator().manual_seed(1))
    logits[:, VOCABULARY:] = 50.0
    got = scores_of("top_k", logits, prefix).softmax(-1)
    assert got.shape == (2, VOCABULARY)
    assert bool((got[:, width:] == 0).all())
    assert torch.allclose(got.sum(-1), torch.ones(2))
    known = min(width, VOCABULARY)
    assert torch.equal(got.argmax(-1), logits[:, :known].argmax(-1))
