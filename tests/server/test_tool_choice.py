"""Tools as agents use them, over HTTP: told of them, called, answered; by both official clients, streamed and not."""

from __future__ import annotations

import json

import pytest

from tests.server.conftest import anthropic_client, openai_client, serving
from tests.server.scripted import ALONE, CALL, FOUND, INTRODUCTION, THOUGHT, scripted_engine

pytest.importorskip("anthropic")
pytest.importorskip("llguidance")

USER = {"role": "user", "content": "What is the weather in Oslo?"}
RAIN = "Rain, 3 degrees."
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
NAMES = ("weather", "clock")
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in NAMES]
CLAUDES = [{"name": name, "input_schema": SCHEMA} for name in NAMES]
HOW = {"temperature": 1.0, "seed": 1}
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


def ask(client, messages, stream, **options):
    """(message as a client sends it back, finish reason, tokens of the prompt), however it comes."""
    how = {"model": "tiny", "messages": messages, "tools": TOOLS, "max_tokens": 300, **HOW, **options}
    if not stream:
        answer = client.chat.completions.create(**how)
        choice = answer.choices[0]
        return choice.message.model_dump(exclude_none=True), choice.finish_reason, answer.usage.prompt_tokens
    message, reason, usage = {"role": "assistant"}, None, None
    for chunk in client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            reason = choice.finish_reason or reason
            delta = choice.delta.model_dump(exclude_none=True)
            for name in ("content", "reasoning_content"):
                if delta.get(name):
                    message[name] = message.get(name, "") + delta[name]
            for call in delta.get("tool_calls", []):
                assert call.pop("index") == len(message.setdefault("tool_calls", []))
                message["tool_calls"].append(call)
    return message, reason, usage.prompt_tokens


def called(message):
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message["tool_calls"]]


@STREAMED
def test_auto_from_the_question_to_the_answer(client, engine, stream):
    """With text before the call and reasoning before that; and all of it is in the next prompt."""
    message, reason, _ = ask(client, [USER], stream, tool_choice="auto")
    assert reason == "tool_calls"
    assert message["reasoning_content"].strip() == THOUGHT
    assert message["content"] == INTRODUCTION
    assert called(message) == [("weather", CALL)]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": RAIN}
    after, reason, tokens = ask(client, [USER, message, result], stream)
    assert (after["content"], reason) == (FOUND, "stop")
    assert "tool_calls" not in after
    function = {**message["tool_calls"][0]["function"], "arguments": CALL}
    turns = [USER, {**message, "tool_calls": [{"type": "function", "function": function}]}, result]
    rendered = engine.tokenizer.apply_chat_template(
        turns, tools=TOOLS, add_generation_prompt=True, return_dict=False, tokenize=False
    )
    assert tokens == len(engine.tokenizer(rendered).input_ids)
    assert THOUGHT in rendered
    assert '"days": 2' in rendered


@STREAMED
@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", NAMES), *(({"type": "function", "function": {"name": name}}, (name,)) for name in NAMES)],
    ids=["required", *NAMES],
)
def test_forced(client, stream, choice, names):
    """Also a call that the model would not have made: it was about to think, and to call another."""
    message, reason, _ = ask(client, [USER], stream, tool_choice=choice)
    assert reason == "tool_calls"
    ((name, arguments),) = called(message)
    assert name in names
    assert arguments["city"] in ("Oslo", "Rome")
    assert arguments["days"] in (1, 2)
    assert not message.get("content")
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": RAIN}
    assert ask(client, [USER, message, result], stream)[0]["content"] == FOUND


@STREAMED
def test_none(client, stream):
    message, reason, _ = ask(client, [USER], stream, tool_choice="none")
    assert (message["content"], reason) == (ALONE, "stop")
    assert "tool_calls" not in message


@STREAMED
def test_tools_that_are_not_asked_for_are_auto(client, stream):
    assert called(ask(client, [USER], stream)[0]) == [("weather", CALL)]


def ask_claude(client, messages, stream, **options):
    how = {"model": "tiny", "messages": messages, "tools": CLAUDES, "max_tokens": 300, "extra_body": HOW, **options}
    if not stream:
        return client.messages.create(**how)
    with client.messages.stream(**how) as told:
        return told.get_final_message()


@STREAMED
def test_claudes_auto_from_the_question_to_the_answer(claude, engine, stream):
    answer = ask_claude(claude, [USER], stream, tool_choice={"type": "auto"})
    assert answer.stop_reason == "tool_use"
    assert [block.type for block in answer.content] == ["thinking", "text", "tool_use"]
    thought, text, call = answer.content
    assert thought.thinking.strip() == THOUGHT
    assert text.text == INTRODUCTION
    assert (call.name, call.input) == ("weather", CALL)
    turns = [
        USER,
        {"role": "assistant", "content": [block.model_dump() for block in answer.content]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": RAIN}]},
    ]
    after = ask_claude(claude, turns, stream)
    assert after.stop_reason == "end_turn"
    assert [block.text for block in after.content] == [FOUND]
    counted = claude.messages.count_tokens(model="tiny", messages=turns, tools=CLAUDES).input_tokens
    assert after.usage.input_tokens + after.usage.cache_read_input_tokens == counted
    assert counted > len(engine.tokenizer(RAIN).input_ids) + len(engine.tokenizer(USER["content"]).input_ids)
    assert after.usage.cache_read_input_tokens > len(engine.tokenizer(USER["content"]).input_ids), "read before"


@STREAMED
@pytest.mark.parametrize(
    ("choice", "names"),
    [({"type": "any"}, NAMES), *(({"type": "tool", "name": name}, (name,)) for name in NAMES)],
    ids=["any", *NAMES],
)
def test_claudes_forced(claude, stream, choice, names):
    answer = ask_claude(claude, [USER], stream, tool_choice=choice)
    assert answer.stop_reason == "tool_use"
    (call,) = answer.content
    assert call.name in names
    assert call.input["days"] in (1, 2)
    turns = [
        USER,
        {"role": "assistant", "content": [call.model_dump()]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": RAIN}]},
    ]
    assert ask_claude(claude, turns, stream).content[0].text == FOUND


@STREAMED
def test_claudes_none(claude, stream):
    answer = ask_claude(claude, [USER], stream, tool_choice={"type": "none"})
    assert answer.stop_reason == "end_turn"
    assert [block.text for block in answer.content] == [ALONE]
