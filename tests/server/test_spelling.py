"""Text of an answer: stop strings cut, nothing said that has to be taken back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from offload_triforce.server.spelling import Speller, StopWatch, overlap
from tests.byte_tokenizer import byte_tokenizer

LETTERS = st.text("ab.", max_size=12)


@given(st.lists(LETTERS, max_size=5), st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3))
def test_a_text_ends_before_its_first_stop_string(pieces, stops):
    watch = StopWatch(stops)
    said = "".join(watch.push(piece) for piece in pieces) + watch.push("", last=True)
    whole = "".join(pieces)
    places = [whole.find(stop) for stop in stops if stop in whole]
    if watch.found is None:
        assert not places
        assert said == whole
    else:
        assert whole.startswith(said + watch.found)
        assert not any(stop in said for stop in stops)


def test_what_cannot_be_a_stop_string_is_not_held_back():
    watch = StopWatch(["END"])
    assert watch.push("an E") == "an "
    assert watch.push("M") == "EM"


def test_overlap():
    assert overlap("abab", "abc") == 2
    assert overlap("abc", "abc") == 0
    assert overlap("", "a") == 0


def test_special_tokens_are_spelled_only_where_they_are_marks():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]", "<|other|>"]})
    ids = tokenizer("a[TOOL_CALLS]b<|other|>c</s>").input_ids
    end = frozenset({tokenizer.eos_token_id})

    def spell(keep):
        speller = Speller(tokenizer, end, [], keep)
        return "".join(map(speller.push, ids)) + speller.finish()

    assert spell(["[TOOL_CALLS]"]) == "a[TOOL_CALLS]bc"
    assert spell([]) == "abc"
