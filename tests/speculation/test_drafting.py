"""Which draft guesses, and how far: what pays is found out."""

from __future__ import annotations

import pytest
import torch

from offload_triforce.speculation import drafting as module
from offload_triforce.speculation.drafting import RETRY, Drafting
from offload_triforce.speculation.rules import Guess
from offload_triforce.speculation.text import TokenText

TEXT = TokenText(torch.arange(5), 30)


class Fixed:
    """A draft of one kind that always guesses as much as it may."""

    def __init__(self, kind, tokens=99):
        self.kind, self.tokens, self.asked = kind, tokens, []

    def offer(self, text):
        return self.kind

    def guess(self, text, count, before):
        self.asked.append(count)
        return [Guess(1, None)] * min(count, self.tokens)


def even(count):
    """A step costs the same however many guesses it reads."""
    return 1.0


def dear(count):
    """Each guess costs as much as the step."""
    return 1.0 + count


def test_without_adaptation_the_first_that_can_guesses_all_it_may():
    mute, first, second = Fixed(None), Fixed("ngram 4"), Fixed("model")
    drafting = Drafting([mute, first, second], 5, adaptive=False)
    assert len(drafting.guess(TEXT, 9, even)) == 5
    assert len(drafting.guess(TEXT, 3, even)) == 3
    assert (mute.asked, first.asked, second.asked) == ([], [5, 3], [])


@pytest.mark.parametrize("limit", [0, -2])
def test_no_room_no_guess(limit):
    draft = Fixed("model")
    assert Drafting([draft], 5, adaptive=True).guess(TEXT, limit, even) == []
    assert draft.asked == []


def test_nobody_to_ask():
    assert Drafting([], 5, adaptive=True).guess(TEXT, 4, even) == []


def test_free_guesses_are_always_made_and_dear_ones_are_not():
    free = Drafting([Fixed("ngram 2")], 6, adaptive=True, timed=False)
    assert len(free.guess(TEXT, 6, even)) == 6
    costly = Drafting([Fixed("ngram 2")], 6, adaptive=True, timed=False)
    assert costly.guess(TEXT, 6, dear) == []


def test_a_kind_that_fails_is_given_up_and_tried_again():
    """Each guess costs a twentieth of a step: it pays while one in ten is right."""
    draft = Fixed("model")
    drafting = Drafting([draft], 4, adaptive=True, timed=False)
    step = lambda count: 1.0 + 0.05 * count  # noqa: E731
    made = []
    for _ in range(40 + 3 * RETRY):
        guesses = drafting.guess(TEXT, 4, step)
        made.append(len(guesses))
        if guesses:
            drafting.learn(len(guesses), 0)
    assert made[0] == 4
    assert 0 in made
    tail = made[made.index(0) :]
    assert sum(count > 0 for count in tail) >= 2, "tried again"
    assert sum(count > 0 for count in tail) <= len(tail) / RETRY + 1


def test_of_two_that_serve_the_better_one():
    """Look-up where it matches with confidence, the model elsewhere; the model's own time counts."""
    lookup, model = Fixed("ngram 2"), Fixed("model")
    drafting = Drafting([lookup, model], 4, adaptive=True, timed=False)
    drafting.guess(TEXT, 4, even)
    assert model.asked
    assert not lookup.asked, "a match of two tokens is no match for a model"
    lookup.kind = "ngram 32"
    drafting.guess(TEXT, 4, even)
    assert len(lookup.asked) == 1


def test_what_is_learnt_belongs_to_the_kind():
    lookup = Fixed("ngram 2")
    drafting = Drafting([lookup], 4, adaptive=True, timed=False)
    step = lambda count: 1.0 + 0.2 * count  # noqa: E731
    for _ in range(30):
        drafting.guess(TEXT, 4, even)
        drafting.learn(4, 4)
    assert len(drafting.guess(TEXT, 4, step)) == 4
    lookup.kind = "ngram 4"
    assert len(drafting.guess(TEXT, 4, step)) < 4


def test_the_drafts_own_time_counts(monkeypatch):
    """A guess that is right takes ten times as long as the step that it saves."""
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    draft = Fixed("model")
    drafting = Drafting([draft], 1, adaptive=True)
    for _ in range(5):
        drafting.guess(TEXT, 1, even)
        drafting.learn(1, 1)
    assert draft.asked == [1], "once, to find out"
