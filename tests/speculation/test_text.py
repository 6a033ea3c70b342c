"""The token sequence that all levels share."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from offload_triforce.speculation.text import TokenText

TOKENS = st.lists(st.integers(0, 2**31), max_size=5)


@given(TOKENS, st.lists(st.one_of(TOKENS, st.integers(0, 9)), max_size=15))
def test_grows_and_takes_back_as_a_list_does(prompt, steps):
    """A list is the model: a list step appends, a number truncates."""
    text, model = TokenText(torch.tensor(prompt, dtype=torch.long), 100), list(prompt)
    for step in steps:
        if isinstance(step, list):
            text.append(step)
            model += step
        else:
            text.truncate(min(step, len(model)))
            model = model[:step]
        assert len(text) == len(model)
        assert text[:] == text.ids.tolist() == model
        assert text[2:-1] == model[2:-1]
        assert text[-1:] == model[-1:]


def test_ids_are_a_view():
    """Growing moves no memory, however long the text is."""
    text = TokenText(torch.tensor([1, 2]), 10)
    before = text.ids
    text.append([3])
    assert before.data_ptr() == text.ids.data_ptr()
    assert before.tolist() == [1, 2]


def test_the_prompt_is_not_written_to():
    prompt = torch.tensor([1, 2, 3])
    text = TokenText(prompt, 10)
    text.truncate(1)
    text.append([9])
    assert prompt.tolist() == [1, 2, 3]
    assert text[:] == [1, 9]


def test_decided_is_what_there_was_at_the_last_verdict():
    text = TokenText(torch.tensor([1, 2]), 10)
    assert text.decided == 2
    text.append([3, 4])
    assert text.decided == 2
    text.truncate(3)
    text.decide()
    assert text.decided == 3
