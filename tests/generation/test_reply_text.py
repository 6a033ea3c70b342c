"""Thoughts told apart from what is said, however the text is cut into pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_triforce.generation.reply_text import ReplyText, held_back


def told(pieces, **how):
    """(thoughts, said, all that was given out in order) of an answer."""
    text = ReplyText(**how)
    out = [part for piece in pieces for part in text.push(piece)] + text.push("", last=True)
    assert "".join(part for thought, part in out if thought) == text.thoughts
    assert "".join(part for thought, part in out if not thought) == text.said
    assert [thought for thought, _ in out] == sorted((thought for thought, _ in out), reverse=True)
    assert all(part for _, part in out)
    return text.thoughts, text.said


@pytest.mark.parametrize(
    ("answer", "how", "expected"),
    [
        ("Hello.", {}, ("", "Hello.")),
        ("<think>\nHm.\n</think>\n\nHello.", {}, ("Hm.", "Hello.")),
        ("\n <think>Hm.</think>Hello.", {}, ("Hm.", "Hello.")),
        ("Hm.\n</think>\n\nHello.", {"thinking": True}, ("Hm.", "Hello.")),
        ("\n</think>\n\nHello.", {"thinking": True}, ("", "\n\nHello.")),
        ("Write <think> and </think>.", {}, ("", "Write <think> and </think>.")),
        ("<think>a</think>b<think>c</think>", {}, ("a", "b<think>c</think>")),
        ("<think>never", {}, ("never", "")),
        ("<thin", {}, ("", "<thin")),
        (" Hi.\n\nUser: And?", {"stop": "\nUser:"}, ("", " Hi.\n")),
        (" Hi.\nUser", {"stop": "\nUser:"}, ("", " Hi.\nUser")),
        ("<think>\nUser: x</think>y\nUser:", {"stop": "\nUser:"}, ("User: x", "y")),
        ("  indented", {}, ("", "  indented")),
        ("", {}, ("", "")),
    ],
)
def test_an_answer_in_one_piece_and_in_single_characters(answer, how, expected):
    assert told([answer], **how) == expected
    assert told(answer, **how) == expected


PARTS = st.sampled_from(["<think>", "</think>", "<", "think", "\n", " ", "a", "</", "\nUser:", "\nUs", "ü"])


@given(
    st.lists(PARTS, max_size=8).map("".join),
    st.lists(st.integers(0, 40)),
    st.booleans(),
    st.sampled_from([None, "\nUser:"]),
)
def test_how_it_is_cut_does_not_matter(answer, places, thinking, stop):
    places = sorted({min(place, len(answer)) for place in places})
    pieces = [answer[start:end] for start, end in zip([0, *places], [*places, len(answer)], strict=True)]
    assert told(pieces, thinking=thinking, stop=stop) == told([answer], thinking=thinking, stop=stop)


def test_nothing_is_held_back_that_need_not_be():
    text = ReplyText(stop="\nUser:")
    assert text.push("Hello") == [(False, "Hello")]
    assert text.push(" there\nU") == [(False, " there")]
    assert text.push("p") == [(False, "\nUp")]
    thinking = ReplyText(thinking=True)
    assert thinking.push("one <") == [(True, "one")]
    assert thinking.push("two") == [(True, " <two")]


def test_held_back():
    assert held_back("abc</th", "</think>") == 4
    assert held_back("<</", "</think>") == 2
    assert held_back("abc", "</think>") == 0
    assert held_back("</think>", "</think>") == 0
