"""Who may be asked out of turn: transformers' own, shown to depend on ids and scores alone; and what users declare."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor
from transformers.generation import logits_process

from offload_triforce import InputError, forkable, stateless
from offload_triforce.speculation import processors
from offload_triforce.speculation.processors import Kind, check_forks, fork_of, kind_of, name_of, target_only
from tests.stateful import Counting, Forking, ForkingSuccessor, Fussy, Moody, Sequence, Successor

WORDS = 80
EOS = torch.tensor([2])


def synthid():
    return logits_process.SynthIDTextWatermarkLogitsProcessor(
        ngram_len=3,
        keys=[5, 11, 17],
        sampling_table_size=64,
        sampling_table_seed=0,
        context_history_size=8,
        device=torch.device("cpu"),
    )


def constrained(function):
    return logits_process.PrefixConstrainedLogitsProcessor(function, 1)


# Arguments for each of transformers' own that drafts may call.
ARGUMENTS = {
    "TemperatureLogitsWarper": (0.7,),
    "TopKLogitsWarper": (5,),
    "TopPLogitsWarper": (0.8,),
    "MinPLogitsWarper": (0.1,),
    "TypicalLogitsWarper": (0.7,),
    "EpsilonLogitsWarper": (0.05,),
    "EtaLogitsWarper": (0.05,),
    "MinLengthLogitsProcessor": (9, EOS),
    "MinNewTokensLengthLogitsProcessor": (6, 3, EOS),
    "RepetitionPenaltyLogitsProcessor": (1.5,),
    "EncoderRepetitionPenaltyLogitsProcessor": (1.5, torch.tensor([[1, 2, 3]])),
    "TopHLogitsWarper": (0.6,),
    "NoRepeatNGramLogitsProcessor": (2,),
    "EncoderNoRepeatNGramLogitsProcessor": (2, torch.tensor([[1, 2, 3, 1, 4]])),
    "SequenceBiasLogitsProcessor": ([[[3], 2.0], [[1, 2], -4.0], [[2, 1, 5], 4.0]],),
    "NoBadWordsLogitsProcessor": ([[3], [1, 2], [2, 1, 5]],),
    "ForcedBOSTokenLogitsProcessor": (1,),
    "ForcedEOSTokenLogitsProcessor": (9, 2),
    "InfNanRemoveLogitsProcessor": (),
    "ExponentialDecayLengthPenalty": ((2, 1.5), EOS, 4),
    "LogitNormalization": (),
    "SuppressTokensAtBeginLogitsProcessor": ([3, 4], 6),
    "SuppressTokensLogitsProcessor": ([3, 4],),
    "WhisperTimeStampLogitsProcessor": None,
    "AlternatingCodebooksLogitsProcessor": (4, 6, 9),
    "BarkEosPrioritizerLogitsProcessor": (2, 0.02),
    "WatermarkLogitsProcessor": None,
}


def build(name):
    kind = getattr(logits_process, name)
    if name == "WatermarkLogitsProcessor":
        return kind(WORDS, "cpu", context_width=2, seeding_scheme="selfhash")
    if name == "WhisperTimeStampLogitsProcessor":
        config = GenerationConfig(eos_token_id=2)
        config.no_timestamps_token_id = 15
        return kind(config, 4)
    return kind(*ARGUMENTS[name])


def asked(count):
    """Ids and scores of places of several paths, in no order, some of them twice."""
    generator = torch.Generator().manual_seed(3)
    places = [
        (torch.randint(1, 6, (1, 1 + number % 11), generator=generator), torch.randn(1, WORDS, generator=generator))
        for number in range(count)
    ]
    return [*places, *places[::-3]]


def test_arguments_are_there_for_all_that_are_known():
    assert set(ARGUMENTS) == set(processors._ROW) | set(processors._TEXT)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_transformers_own_depend_on_ids_and_scores_alone(name):
    """One that has been asked about everything answers as a new one does; and it does something at all."""
    used, changed = build(name), False
    assert kind_of(used) is (Kind.ROW if name in processors._ROW else Kind.TEXT)
    for ids, scores in asked(60):
        got = used(ids, scores.clone())
        assert torch.equal(got, build(name)(ids, scores.clone()))
        changed |= not torch.equal(got, scores)
    assert changed or name == "InfNanRemoveLogitsProcessor"


@pytest.mark.parametrize("name", processors._ROW)
def test_rows_do_not_know_of_each_other(name):
    """Nor of their ids: all rows at once, without ids, are the rows one by one."""
    rows = torch.cat([scores for _, scores in asked(12)])
    together = build(name)(torch.empty(len(rows), 0, dtype=torch.long), rows.clone())
    alone = [build(name)(torch.tensor([[1, 2]]), row.clone()) for row in rows.split(1)]
    assert torch.equal(together, torch.cat(alone))


def test_the_test_above_sees_a_state():
    used = Counting()
    got = [used(ids, scores.clone()) for ids, scores in asked(6)]
    new = [Counting()(ids, scores.clone()) for ids, scores in asked(6)]
    assert not all(torch.equal(one, other) for one, other in zip(got, new, strict=True))


class Subclass(logits_process.TopKLogitsWarper):
    """May do anything."""


class Declared(LogitsProcessor):
    triforce_stateless = True

    def __call__(self, input_ids, scores):
        return scores


class Undeclared(Declared):
    """Adds a state, perhaps."""


class Methods:
    @stateless
    def known(self, batch_id, input_ids):
        return [1]

    def unknown(self, batch_id, input_ids):
        return [1]


def function(input_ids, scores):
    return scores


@pytest.mark.parametrize(
    ("processor", "kind"),
    [
        (function, Kind.UNKNOWN),
        (lambda ids, scores: scores, Kind.UNKNOWN),
        (stateless(lambda ids, scores: scores), Kind.TEXT),
        (stateless(functools.partial(function)), Kind.TEXT),
        (Subclass(3), Kind.UNKNOWN),
        (Declared(), Kind.TEXT),
        (Undeclared(), Kind.UNKNOWN),
        (stateless(Undeclared()), Kind.TEXT),
        (forkable(Undeclared()), Kind.FORKS),
        (Counting(), Kind.UNKNOWN),
        (Forking(), Kind.FORKS),
        (stateless(Forking()), Kind.TEXT),
        (Moody(), Kind.FORKS),
        (Fussy("raises"), Kind.TEXT),
        (synthid(), Kind.FORKS),
        (constrained(Sequence(0, [1])), Kind.UNKNOWN),
        (constrained(stateless(Sequence(0, [1]))), Kind.TEXT),
        (constrained(ForkingSuccessor()), Kind.FORKS),
        (constrained(forkable(Successor())), Kind.FORKS),
        (constrained(Methods().known), Kind.TEXT),
        (constrained(Methods().unknown), Kind.UNKNOWN),
        (constrained(stateless(lambda batch_id, ids: [1])), Kind.TEXT),
    ],
)
def test_kinds(processor, kind):
    assert kind_of(processor) is kind


def test_a_declaration_is_not_inherited():
    """A subclass may keep a state that its class does not."""
    assert kind_of(stateless(Fussy("raises"))) is Kind.TEXT
    assert kind_of(type("Fussier", (Fussy,), {})("raises")) is Kind.UNKNOWN


def test_what_takes_no_attributes_is_not_declared():
    with pytest.raises(InputError, match=r"unknown takes no attributes .*; declare the function or the class"):
        stateless(Methods().unknown)


@pytest.mark.parametrize(
    "make",
    [Forking, Moody, synthid, lambda: constrained(ForkingSuccessor()), lambda: constrained(forkable(Successor()))],
)
def test_forks_go_their_own_way(make):
    """A fork goes on as its original would, and neither sees what the other is asked."""
    places = asked(20)
    first, second = places[:8], places[8:16]
    one = make()
    for ids, scores in first:
        one(ids, scores.clone())
    expected = [copied(ids, scores.clone()) for copied in [copy.deepcopy(one)] for ids, scores in second]
    twin = fork_of(one)
    for ids, scores in reversed(second):
        twin(ids, scores.clone())
    other = fork_of(one)
    assert all(torch.equal(other(ids, s.clone()), row) for (ids, s), row in zip(second, expected, strict=True))
    assert all(torch.equal(one(ids, s.clone()), row) for (ids, s), row in zip(second, expected, strict=True))


class Itself(Counting):
    def fork(self):
        return self


class Open(Counting):
    """Cannot be copied."""

    triforce_forkable = True

    def __init__(self):
        super().__init__()
        self.generator = (number for number in range(3))


@pytest.mark.parametrize(
    ("processor", "reason"), [(Itself(), "its fork is itself"), (Open(), "cannot pickle 'generator' object")]
)
def test_what_cannot_be_forked_is_refused(processor, reason):
    with pytest.raises(InputError, match=f"{type(processor).__name__} cannot be forked .{reason}.; let fork.. return"):
        check_forks([Forking(), processor])
    check_forks([Forking(), Counting()])


def test_names_are_those_that_a_user_knows():
    given = [function, Counting(), Forking(), constrained(Sequence(0, [1])), constrained(Methods().unknown)]
    assert [name_of(processor) for processor in given] == ["function", "Counting", "Forking", "Sequence", "unknown"]
    assert target_only(given) == ("function", "Counting", "Sequence", "unknown")
