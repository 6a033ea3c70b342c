"""A conversation: what is asked of the session, what stays of it, and what is refused."""

import pytest

from offload_triforce import InputError, MemoryLimitError
from offload_triforce.generation.dialogue import LEAST_ANSWER, NEW_TOKENS, Dialogue
from offload_triforce.generation.documents import Document
from tests.generation.talk import ScriptedSession, scripted_engine

SYSTEM = {"role": "system", "content": "S"}


def talk(*answers, error=None, ending="stop", engine=None, **how):
    """(conversation, its session)"""
    engine = engine or scripted_engine()
    session = ScriptedSession(engine.tokenizer, *answers, error=error, ending=ending)
    return Dialogue(engine, session, seed=7, **how), session


def read(reply):
    with reply:
        return "".join(text for _, text in reply)


def said(dialogue):
    return [(message["role"], message["content"]) for message in dialogue.messages]


def test_each_question_carries_the_whole_conversation():
    dialogue, session = talk("A.", " B. ", messages=[SYSTEM])
    assert read(dialogue.ask("a?")) == "A."
    assert read(dialogue.ask("b?")) == " B. "
    assert [text for text, _ in session.asked] == [
        "<system>S<user>a?<assistant>",
        "<system>S<user>a?<assistant>A.<user>b?<assistant>",
    ]
    assert said(dialogue)[1:] == [("user", "a?"), ("assistant", "A."), ("user", "b?"), ("assistant", "B.")]
    assert dialogue.exchanges == 2
    assert dialogue.used == dialogue.stats.prompt_tokens + dialogue.stats.new_tokens > 0


def test_options_and_seed_are_handed_on():
    dialogue, session = talk(options={"temperature": 0.5})
    read(dialogue.ask("a?", progress="P"))
    _, options = session.asked[0]
    assert options == {"temperature": 0.5, "max_new_tokens": NEW_TOKENS, "seed": 7, "progress": "P"}


def test_thoughts_are_kept_apart_from_what_was_said():
    """The template leaves them out of what is past, as this one does, which knows nothing of them."""
    dialogue, session = talk("<think>\nhm\n</think>\n\nA.", "B.")
    with dialogue.ask("a?") as reply:
        assert list(reply) == [(True, "hm"), (False, "A.")]
    assert dialogue.messages[-1] == {"role": "assistant", "content": "A.", "reasoning_content": "hm"}
    read(dialogue.ask("b?"))
    assert session.asked[1][0] == "<user>a?<assistant>A.<user>b?<assistant>"


def test_thoughts_that_the_template_begins():
    engine = scripted_engine("{{ messages[-1]['content'] }}<assistant>\n<think>\n")
    dialogue, _ = talk("hm</think>A.", engine=engine)
    with dialogue.ask("a?") as reply:
        assert list(reply) == [(True, "hm"), (False, "A.")]


@pytest.mark.parametrize("pieces", [["A", "^C"], ["A", "fail"]])
def test_what_was_said_before_an_end_is_kept(pieces):
    dialogue, session = talk(pieces, "whole", error=MemoryLimitError("full"))
    if "fail" in pieces:
        with pytest.raises(MemoryLimitError):
            read(dialogue.ask("a?"))
    else:
        read(dialogue.ask("a?"))
    assert said(dialogue) == [("user", "a?"), ("assistant", "A")]
    assert dialogue.stats.interrupted
    assert read(dialogue.retry()) == "whole"  # greedy, but the one before was not whole
    assert said(dialogue) == [("user", "a?"), ("assistant", "whole")]
    assert session.asked[0][0] == session.asked[1][0]


@pytest.mark.parametrize("pieces", [["^C"], ["<think>hm", "^C"], ["fail"]])
def test_where_nothing_was_said_the_conversation_is_as_before(pieces):
    dialogue, session = talk("A.", pieces, "B.", error=MemoryLimitError("full"))
    read(dialogue.ask("a?"))
    before = said(dialogue)
    dialogue.attach(Document("d", "text"))
    reply = dialogue.ask("b?")
    try:
        read(reply)
    except MemoryLimitError:
        assert pieces == ["fail"]
    assert not reply.kept
    assert said(dialogue) == before
    assert [each.name for each in dialogue.documents] == ["d"]
    assert read(dialogue.retry()) == "B."  # asks the question that got no answer, with its document
    assert session.asked[-1][0] == session.asked[-2][0]
    assert "text" in said(dialogue)[-2][1]
    assert said(dialogue)[-2][1].endswith("b?")
    assert dialogue.documents == []


def test_retry_draws_with_another_seed_and_keeps_the_older_answer_until_there_is_one():
    dialogue, session = talk("A.", ["^C"], "C.", options={"temperature": 1.0})
    read(dialogue.ask("a?"))
    dialogue.attach(Document("later", "text"))
    read(dialogue.retry())
    assert said(dialogue) == [("user", "a?"), ("assistant", "A.")]
    read(dialogue.retry())
    assert said(dialogue) == [("user", "a?"), ("assistant", "C.")]
    assert [options["seed"] for _, options in session.asked] == [7, 8, 9]
    assert len({text for text, _ in session.asked}) == 1
    assert len(dialogue.documents) == 1  # of the next question


def test_retry_where_it_cannot_help():
    dialogue, session = talk("A.", "B.")
    with pytest.raises(InputError, match="nothing has been answered"):
        dialogue.retry()
    read(dialogue.ask("a?"))
    with pytest.raises(InputError, match="would be the same"):
        dialogue.retry()
    assert len(session.asked) == 1
    dialogue.options["temperature"] = 0.7
    assert read(dialogue.retry()) == "B."


@pytest.mark.parametrize(("options", "do_sample", "greedy"), [({}, False, True), ({}, True, False)])
def test_greedy_is_the_models_own_unless_somebody_says_so(options, do_sample, greedy):
    dialogue, _ = talk(engine=scripted_engine(do_sample=do_sample), options=options)
    assert dialogue.greedy is greedy
    dialogue.options["temperature"] = 0.0
    assert dialogue.greedy
    dialogue.options["temperature"] = 0.1
    assert not dialogue.greedy


def test_undo_takes_one_exchange_back():
    dialogue, session = talk("A.", "B.", "C.", messages=[SYSTEM])
    with pytest.raises(InputError, match="nothing to take back"):
        dialogue.undo()
    read(dialogue.ask("a?"))
    used = dialogue.used
    read(dialogue.ask("b?"))
    assert dialogue.undo() == "b?"
    assert said(dialogue) == [("system", "S"), ("user", "a?"), ("assistant", "A.")]
    assert 0 < dialogue.used <= used
    read(dialogue.ask("c?"))
    assert session.asked[-1][0] == "<system>S<user>a?<assistant>A.<user>c?<assistant>"


def test_a_new_conversation_keeps_the_instructions():
    dialogue, _ = talk("A.", messages=[SYSTEM])
    read(dialogue.ask("a?"))
    dialogue.clear()
    assert dialogue.messages == [SYSTEM]
    plain, _ = talk("A.")
    read(plain.ask("a?"))
    plain.clear()
    assert plain.messages == []
    assert plain.used == 0


def test_documents_go_into_the_next_question_alone():
    dialogue, session = talk()
    assert dialogue.attach(Document("a.txt", "first")) == 5
    dialogue.attach(Document("b.txt", "second\n"))
    read(dialogue.ask("Which?"))
    read(dialogue.ask("Sure?"))
    first, second = (text for text, _ in session.asked)
    assert first == (
        '<user><document name="a.txt">\nfirst\n</document>\n\n<document name="b.txt">\nsecond\n</document>\n\nWhich?'
        "<assistant>"
    )
    assert second.count("first") == 1
    assert second.startswith(first)


def test_a_model_without_a_template():
    dialogue, session = talk([" A.\n", "\nUs", "er: next"], " B.", engine=scripted_engine(None), messages=[SYSTEM])
    assert dialogue.plain
    assert read(dialogue.ask("a?")) == " A.\n"
    read(dialogue.ask("b?"))
    assert session.asked[0][1]["stop_strings"] == ["\nUser:"]
    assert session.asked[1][0] == "S\n\nUser: a?\n\nAssistant: A.\n\nUser: b?\n\nAssistant:"


def test_a_question_that_is_none_or_that_the_template_refuses():
    dialogue, session = talk()
    with pytest.raises(InputError, match="nothing to ask"):
        dialogue.ask("  ")
    with pytest.raises(InputError, match="not with me"):
        dialogue.ask("no")
    assert dialogue.messages == []
    assert session.asked == []


def test_an_answer_is_as_long_as_fits():
    dialogue, session = talk(engine=scripted_engine(positions=200))
    read(dialogue.ask("x" * 100))
    assert session.asked[0][1]["max_new_tokens"] == 200 - len("<user><assistant>") - 100
    dialogue.options["max_new_tokens"] = 5
    dialogue.undo()
    read(dialogue.ask("x"))
    assert session.asked[1][1]["max_new_tokens"] == 5


def test_too_long_says_by_how_much_and_keeps_the_conversation():
    dialogue, session = talk("A.", engine=scripted_engine(positions=100))
    read(dialogue.ask("a?"))
    before = said(dialogue)
    prompt = len("<user>a?<assistant>A.<user><assistant>") + 60
    with pytest.raises(
        InputError, match=f"has {prompt} tokens.*: {prompt + LEAST_ANSWER - 100} more than the 100"
    ) as error:
        dialogue.ask("x" * 60)
    assert "--context" not in str(error.value)  # the model's own limit
    assert said(dialogue) == before
    assert len(session.asked) == 1
    limited, _ = talk(engine=scripted_engine(positions=1000, context=100))
    with pytest.raises(InputError, match=r"--context sets how many fit, up to the model's 1,000"):
        limited.ask("x" * 100)
    with pytest.raises(InputError, match=r"book has 101 tokens, 1 more than the 100 that .*--context"):
        limited.attach(Document("book", "x" * 101))
    assert limited.documents == []


def test_no_answer_crosses_longrope_switch():
    dialogue, session = talk(engine=scripted_engine(longrope_switch=60))
    read(dialogue.ask("x" * 20))
    assert session.asked[0][1]["max_new_tokens"] == 60 - 20 - len("<user><assistant>")
