"""Which drafter drafts, and how far: what pays is found out."""

from __future__ import annotations

import pytest
import torch

from offload_triforce.speculation.acceptance import DraftToken
from offload_triforce.speculation.draft_selector import RETRY, DraftSelector
from offload_triforce.speculation.text import TokenText

TEXT = TokenText(torch.arange(5), 30)


class Fixed:
    """A drafter of one kind that always drafts as much as it may."""

    def __init__(self, kind, tokens=99):
        self.kind, self.tokens, self.asked = kind, tokens, []

    def offer(self, text):
        return self.kind

    def draft(self, text, count, before):
        self.asked.append(count)
        return [DraftToken(1, None)] * min(count, self.tokens)


def even(count):
    """A step costs the same however many draft tokens it reads."""
    return 1.0


def dear(count):
    """Each draft token costs as much as the step."""
    return 1.0 + count


def test_without_adaptation_the_first_that_can_drafts_all_it_may():
    mute, first, second = Fixed(None), Fixed("ngram 4"), Fixed("model")
    selector = DraftSelector([mute, first, second], 5, adaptive=False)
    assert len(selector.draft(TEXT, 9, even)) == 5
    assert len(selector.draft(TEXT, 3, even)) == 3
    assert (mute.asked, first.asked, second.asked) == ([], [5, 3], [])


@pytest.mark.parametrize("limit", [0, -2])
def test_no_room_no_draft(limit):
    draft = Fixed("model")
    assert DraftSelector([draft], 5, adaptive=True).draft(TEXT, limit, even) == []
    assert draft.asked == []


def test_nobody_to_ask():
    assert DraftSelector([], 5, adaptive=True).draft(TEXT, 4, even) == []


def test_free_draft_tokens_are_always_made_and_dear_ones_are_not():
    free = DraftSelector([Fixed("ngram 2")], 6, adaptive=True)
    assert len(free.draft(TEXT, 6, even)) == 6
    costly = DraftSelector([Fixed("ngram 2")], 6, adaptive=True)
    assert costly.draft(TEXT, 6, dear) == []


def test_a_kind_that_fails_is_given_up_and_tried_again():
    """Each draft token costs a twentieth of a step: it pays while one in ten is right."""
    draft = Fixed("model")
    selector = DraftSelector([draft], 4, adaptive=True)
    step = lambda count: 1.0 + 0.05 * count  # noqa: E731
    made = []
    for _ in range(40 + 3 * RETRY):
        drafted = selector.draft(TEXT, 4, step)
        made.append(len(drafted))
        if drafted:
            selector.learn(len(drafted), 0)
    assert made[0] == 4
    assert 0 in made
    tail = made[made.index(0) :]
    assert sum(count > 0 for count in tail) >= 2, "tried again"
    assert sum(count > 0 for count in tail) <= len(tail) / RETRY + 1


def test_of_two_that_serve_the_better_one():
    """Look-up where it matches with confidence, the model elsewhere; the model's own time counts."""
    lookup, model = Fixed("ngram 2"), Fixed("model")
    selector = DraftSelector([lookup, model], 4, adaptive=True)
    selector.draft(TEXT, 4, even)
    assert model.asked
    assert not lookup.asked, "a match of two tokens is no match for a model"
    lookup.kind = "ngram 32"
    selector.draft(TEXT, 4, even)
    assert len(lookup.asked) == 1


def test_what_is_learnt_belongs_to_the_kind():
    lookup = Fixed("ngram 2")
    selector = DraftSelector([lookup], 4, adaptive=True)
    step = lambda count: 1.0 + 0.2 * count  # noqa: E731
    for _ in range(30):
        selector.draft(TEXT, 4, even)
        selector.learn(4, 4)
    assert len(selector.draft(TEXT, 4, step)) == 4
    lookup.kind = "ngram 4"
    assert len(selector.draft(TEXT, 4, step)) < 4


class Ticking:
    """A clock by which ten seconds pass between one mark and the next."""

    def __init__(self):
        self.marks = 0

    def mark(self):
        self.marks += 1
        return Tick(10.0 * self.marks)


class Tick(float):
    def since(self, earlier):
        return self - earlier


def test_the_drafts_own_time_counts():
    """A draft token that is right takes ten times as long as the step that it saves."""
    draft = Fixed("model")
    selector = DraftSelector([draft], 1, adaptive=True, clock=Ticking())
    for _ in range(5):
        selector.draft(TEXT, 1, even)
        selector.learn(1, 1)
    assert draft.asked == [1], "once, to find out"
