"""Reasoning apart from the answer, over HTTP: as ``reasoning_content``, and as blocks of ``thinking``."""

from __future__ import annotations

import json

import pytest

from tests.server.conftest import anthropic_client, openai_client, serving
from tests.server.scripted import ALONE, RESULT, SUM, scripted_engine

pytest.importorskip("anthropic")

USER = [{"role": "user", "content": "What is two and two?"}]
THINK = {"chat_template_kwargs": {"enable_thinking": True}}
STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


@pytest.fixture(scope="module")
def engine():
    with scripted_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def address(engine):
    with serving(engine) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai_client(address) as client:
        yield client


@pytest.fixture(scope="module")
def claude(address):
    with anthropic_client(address) as client:
        yield client


def ask(client, stream, messages=USER, **options):
    """(reasoning, content, finish reason); each None where there was none."""
    how = {"model": "tiny", "messages": messages, "max_tokens": 300, "temperature": 0, **options}
    if not stream:
        choice = client.chat.completions.create(**how).choices[0]
        return (choice.message.model_extra or {}).get("reasoning_content"), choice.message.content, choice.finish_reason
    told, reason = {"reasoning_content": None, "content": None}, None
    for chunk in client.chat.completions.create(**how, stream=True):
        reason = chunk.choices[0].finish_reason or reason
        for name, text in chunk.choices[0].delta.model_dump(exclude_none=True).items():
            if name in told and text:
                told[name] = (told[name] or "") + text
    return told["reasoning_content"], told["content"], reason


@STREAMED
def test_reasoning_that_the_template_has_opened(client, stream):
    reasoning, content, reason = ask(client, stream, extra_body=THINK)
    assert (reasoning.strip(), content, reason) == (SUM, RESULT, "stop")


@STREAMED
def test_reasoning_that_is_empty_is_none(client, stream):
    assert ask(client, stream) == (None, ALONE, "stop")


@STREAMED
def test_an_answer_that_ends_while_it_thinks(client, stream):
    reasoning, content, reason = ask(client, stream, extra_body=THINK, max_tokens=1)
    assert (reasoning, content or None, reason) == (SUM, None, "length")


@STREAMED
def test_a_shape_begins_behind_the_reasoning(client, stream):
    pytest.importorskip("llguidance")
    shape = {"type": "object", "properties": {"sum": {"enum": [4, 5]}}, "required": ["sum"]}
    shape["additionalProperties"] = False
    wanted = {"type": "json_schema", "json_schema": {"name": "sum", "schema": shape}}
    reasoning, content, reason = ask(client, stream, extra_body={**THINK, "response_format": wanted})
    assert (reasoning, reason) == (SUM, "stop")
    assert json.loads(content)["sum"] in (4, 5)
    reasoning, content, _ = ask(client, stream, response_format=wanted)
    assert reasoning is None, "the template has opened none"
    assert json.loads(content)["sum"] in (4, 5)


def test_what_was_thought_goes_back_into_the_prompt(client, engine):
    """As agents send it; whether it is shown is the template's affair."""
    turns = [*USER, {"role": "assistant", "content": RESULT, "reasoning_content": SUM}, *USER]
    how = {"model": "tiny", "max_tokens": 1, "temperature": 0}
    told = client.chat.completions.create(messages=turns, **how).usage.prompt_tokens
    untold = [{name: text for name, text in turn.items() if name != "reasoning_content"} for turn in turns]
    less = client.chat.completions.create(messages=untold, **how).usage.prompt_tokens
    assert told - less == len(engine.tokenizer(f"({SUM})").input_ids)


@STREAMED
@pytest.mark.parametrize("thinking", [{"type": "enabled", "budget_tokens": 1024}, {"type": "adaptive"}], ids=str)
def test_claudes_thinking(claude, stream, thinking):
    how = {"model": "tiny", "messages": USER, "max_tokens": 2000, "thinking": thinking}
    if stream:
        with claude.messages.stream(**how) as told:
            kinds = [event.type for event in told if event.type in ("thinking", "text")]
            answer = told.get_final_message()
        assert kinds == sorted(kinds, reverse=True), "the reasoning comes first"
    else:
        answer = claude.messages.create(**how)
    thought, text = answer.content
    assert (thought.type, thought.thinking.strip()) == ("thinking", SUM)
    assert (text.type, text.text) == ("text", RESULT)
    assert answer.stop_reason == "end_turn"


@STREAMED
def test_claudes_thinking_switched_off(claude, stream):
    how = {"model": "tiny", "messages": USER, "max_tokens": 2000, "thinking": {"type": "disabled"}}
    if stream:
        with claude.messages.stream(**how) as told:
            answer = told.get_final_message()
    else:
        answer = claude.messages.create(**how)
    assert [(block.type, block.text) for block in answer.content] == [("text", ALONE)]


def test_claudes_thoughts_go_back_into_the_prompt(claude, engine):
    thought = {"type": "thinking", "thinking": SUM, "signature": ""}
    hidden = {"type": "redacted_thinking", "data": "xyz"}
    text = {"type": "text", "text": RESULT}
    counted = [
        claude.messages.count_tokens(
            model="tiny", messages=[*USER, {"role": "assistant", "content": blocks}, *USER]
        ).input_tokens
        for blocks in ([thought, hidden, text], [text])
    ]
    assert counted[0] - counted[1] == len(engine.tokenizer(f"({SUM})").input_ids)
