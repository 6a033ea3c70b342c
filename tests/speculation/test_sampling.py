"""The accept/resample rule on its own, and distributions that are transformers' own, row by row."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList
from transformers.generation import (
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from offload_triforce import InputError, UnsupportedModelError
from offload_triforce.speculation.place import PathState, Place
from offload_triforce.speculation.sampling import RandomChoices, Sampler, accept_one, residual, without
from tests.speculation.speculation_toys import Walk, distribution_of
from tests.stateful import Counting, Forking, Fussy, Moody


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
    for draft_token in range(vocabulary):
        if q[draft_token] > 0:
            for token, odds in outcomes([draft_token], q, p).items():
                emitted[token] += q[draft_token] * odds
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


def places_of(prefix, count):
    """The last ``count`` beginnings of a text, the whole one included."""
    ends = range(len(prefix) - count + 1, len(prefix) + 1)
    return [Place(lambda device, end=end: prefix[:end], end) for end in ends]


def sampler_of(processors, vocabulary=VOCABULARY, readable=None):
    return Sampler(LogitsProcessorList(processors), True, vocabulary, readable)


def scores_of(name, logits, prefix, vocabulary=VOCABULARY):
    return sampler_of(PROCESSORS[name], vocabulary).draft_scores(logits, places_of(prefix, len(logits)))


@pytest.mark.parametrize("name", PROCESSORS)
def test_rows_are_transformers_own(name, logits, prefix):
    """Each row with its own prefix, as if it were generated alone; for drafts, and for the target one by one."""
    places, sampler = places_of(prefix, len(logits)), sampler_of(PROCESSORS[name])
    for row, place, scores in zip(logits, places, scores_of(name, logits, prefix), strict=True):
        expected = LogitsProcessorList(PROCESSORS[name])(place.prefix(logits.device)[None], row[None].clone())
        assert torch.equal(scores[None], expected)
        assert torch.equal(sampler.target_scores(row[None], place), expected)


@pytest.mark.parametrize("name", ["repetition penalty", "no_repeat_ngram"])
def test_the_prefix_matters(name, logits, prefix):
    """Guards the test above: with the first row's prefix for all, other distributions would come out."""
    shared = torch.cat([scores_of(name, row[None], prefix[: len(prefix) - len(logits) + 1]) for row in logits])
    assert not torch.allclose(scores_of(name, logits, prefix), shared, atol=1e-3)


@pytest.mark.parametrize("name", PROCESSORS)
def test_prefixes_are_made_only_where_they_are_looked_at(name, logits):
    """Making them costs time, and bringing them to the device does."""
    made = []
    places = [Place(lambda device: made.append(1) or torch.tensor([1, 2]), 2)] * len(logits)
    sampler = sampler_of(PROCESSORS[name])
    sampler.draft_scores(logits, places)
    sampler.target_scores(logits[:1], places[0])
    assert bool(made) == (name in ("repetition penalty", "no_repeat_ngram"))


def test_the_logits_stay_as_they_are(logits, prefix):
    """Processors may write into their scores; a level's logits are not theirs to change."""
    before = logits.clone()
    for name in PROCESSORS:
        scores_of(name, logits, prefix)
    for processor in (Counting(), Forking()):
        sampler_of([processor]).draft_scores(logits, [place_in(PathState()) for _ in logits])
        sampler_of([processor]).target_scores(logits[:1], place_in(None))
    assert torch.equal(logits, before)


def test_half_precision_logits_become_float32(logits, prefix):
    got = scores_of("temperature", logits.bfloat16(), prefix)
    assert got.dtype == torch.float32
    assert torch.equal(got, logits.bfloat16().float() / 0.6)


@pytest.mark.parametrize("width", [VOCABULARY - 2, VOCABULARY + 3])
def test_logits_of_another_width(width, prefix):
    """A draft with fewer padding tokens never drafts the missing ones; one with more never drafts those."""
    logits = torch.randn(2, width, generator=torch.Generator().manual_seed(1))
    logits[:, VOCABULARY:] = 50.0
    got = scores_of("top_k", logits, prefix).softmax(-1)
    assert got.shape == (2, VOCABULARY)
    assert bool((got[:, width:] == 0).all())
    assert torch.allclose(got.sum(-1), torch.ones(2))
    known = min(width, VOCABULARY)
    assert torch.equal(got.argmax(-1), logits[:, :known].argmax(-1))


def test_what_the_target_cannot_read_is_not_drafted(logits, prefix):
    """The target may say it all the same."""
    sampler, places = sampler_of([TemperatureLogitsWarper(2.0)], readable=VOCABULARY - 3), places_of(prefix, 5)
    got = sampler.draft_scores(logits, places)
    assert torch.equal(got[:, :-3], logits[:, :-3] / 2)
    assert bool(got[:, -3:].isneginf().all())
    assert torch.equal(sampler.target_scores(logits[:1], places[0]), logits[:1] / 2)


# --- states and rejections


def place_in(state, ids=(1, 2)):
    return Place(lambda device: torch.tensor(ids), len(ids), state)


def alone(processor, paths, logits):
    """Rows of the nodes of a tree, each after its whole path by a new processor; the root's path is (0,)."""
    rows = {}
    for path in paths:
        fresh = copy.deepcopy(processor)
        for end in range(1, len(path) + 1):
            row = fresh(torch.tensor([path[:end]]), logits[path[:end]].clone())
        rows[path] = row
    return rows


@settings(deadline=None, max_examples=60)
@given(st.data(), st.sampled_from([Forking, Moody]), st.integers(1, 14))
def test_each_path_has_a_state_of_its_own(data, make, count):
    """A tree, its nodes asked about in steps, parents first; then a verdict, and the tree goes on below it."""
    paths = [(0,)]
    for _ in range(count):
        parent = data.draw(st.sampled_from(paths))
        paths.append((*parent, len(paths)))
    generator = torch.Generator().manual_seed(5)
    logits = {path: torch.randn(1, VOCABULARY, generator=generator) for path in paths}
    processor = make()
    expected = alone(processor, paths, logits)
    sampler, states = sampler_of([processor, TemperatureLogitsWarper(1.0)]), {}
    for path in paths:
        states[path] = PathState(states.get(path[:-1]))
    step = data.draw(st.integers(1, 4))
    for start in range(0, len(paths), step):
        some = paths[start : start + step]
        rows = torch.cat([logits[path] for path in some])
        got = sampler.draft_scores(rows, [place_in(states[path], path) for path in some])
        assert torch.equal(got, torch.cat([expected[path] for path in some]))
    moved = data.draw(st.sampled_from(paths))  # the target goes there; what follows starts from its own state
    for end in range(1, len(moved) + 1):
        got = sampler.target_scores(logits[moved[:end]], place_in(None, moved[:end]))
        assert torch.equal(got, expected[moved[:end]])
    for child in [path for path in paths if path[:-1] == moved]:
        got = sampler.draft_scores(logits[child], [place_in(PathState(), child)])
        assert torch.equal(got, expected[child])


def test_drafts_do_not_ask_what_may_be_anything(logits, prefix):
    """Not even once; what stands beside it is applied all the same."""
    processor = Counting()
    sampler = sampler_of([RepetitionPenaltyLogitsProcessor(1.8), processor, TemperatureLogitsWarper(0.7)])
    assert torch.equal(
        sampler.draft_scores(logits, places_of(prefix, 5)), scores_of("repetition penalty", logits, prefix)
    )
    assert processor.seen == []
    sampler.target_scores(logits[:1], place_in(None, [3, 4]))
    assert processor.seen == [[3, 4]]


def test_without_a_state_forks_are_left_out(logits):
    processor = Forking()
    assert torch.equal(sampler_of([processor]).draft_scores(logits, [place_in(None)] * 5), logits)
    assert processor.calls == 0


@pytest.mark.parametrize("how", ["raises", "nothing", "nan", "shape"])
def test_a_rejected_path_has_no_candidates(logits, how):
    """The other rows are as they were. For the target, the error is the user's own."""
    places = [place_in(PathState(), ids) for ids in ([1, 2], [1, 1, 1], [3, 2], [2, 3, 5, 7], [4])]
    sampler = sampler_of([Fussy(how)])
    got = sampler.draft_scores(logits, places)
    assert bool(got[[1, 3]].isneginf().all())
    assert torch.equal(got[[0, 2, 4]], logits[[0, 2, 4]])
    if how == "raises":
        with pytest.raises(ValueError, match="three in a row"):
            sampler.target_scores(logits[:1], places[1])


def test_what_follows_a_rejected_place_is_rejected_too(logits):
    """For a processor with a state: it has none there."""

    class Failing(Forking):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] == 3:
                raise ValueError
            return super().__call__(input_ids, scores)

    before = PathState()
    places = [place_in(before, [1, 2, 3]), place_in(PathState(before), [1, 2, 3, 4]), place_in(PathState(), [1, 2])]
    got = sampler_of([Failing()]).draft_scores(logits[:3], places)
    assert bool(got[:2].isneginf().all())
    assert bool(got[2].isfinite().any())


def test_logits_that_are_no_numbers(logits, prefix):
    """No candidates there; where a processor refuses all rows at once because of one, the others are scored alone."""
    places, sound = places_of(prefix, 5), scores_of("temperature", logits, prefix)
    logits[2, 3] = torch.nan
    for processors in ([], PROCESSORS["temperature"], [EtaLogitsWarper(0.01), *PROCESSORS["temperature"]]):
        got = sampler_of(processors).draft_scores(logits, places)
        assert bool(got[2].isneginf().all())
        assert bool(got[[0, 1, 3, 4]].isfinite().any(dim=1).all())
        assert not bool(got.isnan().any())
    assert torch.equal(scores_of("temperature", logits, prefix)[[0, 1, 3, 4]], sound[[0, 1, 3, 4]])


def test_infinite_scores_are_the_largest_there_are(logits):
    got = sampler_of([Fussy("infinite")]).draft_scores(logits[:1], [place_in(None, [1, 1, 1])])
    assert torch.equal(got, torch.full_like(got, torch.finfo(got.dtype).max))


@pytest.mark.parametrize(
    ("best", "greedy", "sampled"),
    [
        (1.0, None, None),
        (
            float("-inf"),
            None,
            "the logits processors rule out every token after the first 1,234 tokens; let them leave",
        ),
        (float("inf"), None, "a score after the first 1,234 tokens is infinite, so that nothing can be drawn"),
        (float("nan"), *["the logits processors leave scores after the first 1,234 tokens that are not numbers"] * 2),
    ],
)
def test_scores_that_nothing_can_be_taken_by(best, greedy, sampled):
    """As transformers does where it does something sensible; what it would crash or babble on is refused."""
    place = Place(lambda device: torch.tensor([1]), 1234)
    for do_sample, words in ((False, greedy), (True, sampled)):
        sampler = Sampler(LogitsProcessorList(), do_sample, VOCABULARY)
        with nullcontext() if words is None else pytest.raises(InputError, match=words):
            sampler.check(best, torch.zeros(1, VOCABULARY), place)


@pytest.mark.parametrize("processors", [[], [EtaLogitsWarper(0.01)], [InfNanRemoveLogitsProcessor()]])
def test_a_model_without_numbers_is_named(processors):
    """One sentence, whatever a processor says about them; one that puts numbers in their place is enough."""
    logits, place = torch.full((1, VOCABULARY), torch.nan).half(), Place(lambda device: torch.tensor([1]), 1234)
    sampler = sampler_of(processors)
    words = r"the model's logits after the first 1,234 tokens are not numbers \(NaN\).*more range than float16"
    removed = any(isinstance(processor, InfNanRemoveLogitsProcessor) for processor in processors)
    with nullcontext() if removed else pytest.raises(UnsupportedModelError, match=words):
        sampler.check(float(sampler.target_scores(logits, place).max()), logits, place)
