"""The token sequence that all levels share."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from offload_triforce.speculation import text as text_module
from offload_triforce.speculation.text import TokenText

CPU = torch.device("cpu")
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


# Another device than that of the ids, as far as anybody can tell.
ELSEWHERE = torch.device("cpu", 0)
STEPS = st.one_of(TOKENS, st.integers(0, 9), st.just("decide"), st.just("look"))


@given(TOKENS, st.lists(STEPS, max_size=20))
def test_on_a_device_it_is_the_same(prompt, steps):
    """Whatever is added, taken back, decided and looked at in between."""
    text = TokenText(torch.tensor(prompt, dtype=torch.long), 100)
    for step in [*steps, "look"]:
        if step == "decide":
            text.decide()
        elif step == "look":
            assert text.ids_on(ELSEWHERE).tolist() == text.ids.tolist()
        elif isinstance(step, list):
            text.append(step)
        else:
            text.truncate(min(step, len(text)))


def test_what_is_decided_is_brought_to_a_device_once(monkeypatch):
    """At 128K tokens it is a megabyte, for each row of each step."""
    brought, real = [], text_module.to_device
    monkeypatch.setattr(text_module, "to_device", lambda ids, device: brought.append(len(ids)) or real(ids, device))
    text = TokenText(torch.arange(50), 100)
    for token in range(3):
        text.append([token])
        text.ids_on(ELSEWHERE)
    text.decide()
    text.ids_on(ELSEWHERE)
    text.ids_on(ELSEWHERE)
    assert brought == [50, 1, 2, 3, 3]
    assert text.ids_on(CPU).data_ptr() == text.ids.data_ptr(), "on the CPU nothing moves"


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
