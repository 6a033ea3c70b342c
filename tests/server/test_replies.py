"""Answers taken apart: the same parts, however they come in pieces."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_triforce.server.replies import MarkParser, Reasoning, Text, ToolCall, text_of
from offload_triforce.server.tool_formats import Call, read_calls

WEATHER = Call("weather", {"city": "Rome", "days": 2})
PROPERTIES = {"city": {"type": "string"}, "days": {"type": "integer"}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"properties": PROPERTIES}}}]
CALL = '{"name": "weather", "arguments": {"city": "Rome", "days": 2}}'
XML = "<function=weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n2\n</parameter>\n</function>"
PAIRS = "<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n<arg_key>days</arg_key>\n<arg_value>2</arg_value>"
GLM = f"weather\n{PAIRS}\n"

ANSWERS = {
    "text": ("Just <text>, { and } and <think> too.", "", "Just <text>, { and } and <think> too.", []),
    "reasoning": ("<think>\nHm.\n</think>\n\nYes.", "Hm.\n", "Yes.", []),
    "reasoning, cut": ("<think>\nHm, well", "Hm, well", "", []),
    "Hermes": (f"Let me see.\n<tool_call>\n{CALL}\n</tool_call>", "", "Let me see.", [WEATHER]),
    "two calls": (f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", "", "", [WEATHER, WEATHER]),
    "reasoning, call": (f"<think>Hm</think><tool_call>{CALL}</tool_call>", "Hm", "", [WEATHER]),
    "cut call": (f"<tool_call>\n{CALL}", "", "", [WEATHER]),
    "Qwen3-Coder": (f"Well.<tool_call>\n{XML}\n</tool_call>", "", "Well.", [WEATHER]),
    "Seed-OSS": (f"<seed:think>Hm</seed:think><seed:tool_call>\n{XML}\n</seed:tool_call>", "Hm", "", [WEATHER]),
    "GLM": (f"<think></think>\n<tool_call>{GLM}</tool_call>", "", "", [WEATHER]),
    "GLM, nothing": ("<tool_call>weather</tool_call>", "", "", [Call("weather", {})]),
    "Mistral": (f"[TOOL_CALLS][{CALL}, {CALL}]", "", "", [WEATHER, WEATHER]),
    "Mistral, newer": ('[TOOL_CALLS]weather[ARGS]{"city": "Rome", "days": 2}', "", "", [WEATHER]),
    "Magistral": (f"[THINK]Hm[/THINK]Yes. [TOOL_CALLS][{CALL}]", "Hm", "Yes.", [WEATHER]),
    "Llama": ('{"name": "weather", "parameters": {"city": "Rome", "days": 2}}', "", "", [WEATHER]),
    "Llama, tag": (f"<|python_tag|>{CALL}; {CALL}", "", "", [WEATHER, WEATHER]),
    "no call": ("<tool_call>oh</tool_call> no", "", "<tool_call>oh</tool_call> no", []),
    "JSON that is no call": ('{"a": 1}', "", '{"a": 1}', []),
}


def parse(pieces, prompt_end="", tools=TOOLS):
    parser = MarkParser(prompt_end, tools)
    return [part for piece in pieces for part in parser.feed(piece)] + parser.finish()


def calls_of(parts):
    return [Call(part.name, json.loads(part.arguments)) for part in parts if isinstance(part, ToolCall)]


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("step", [1, 2, 7, 1000])
def test_formats(name, step):
    answer, reasoning, text, calls = ANSWERS[name]
    parts = parse([answer[i : i + step] for i in range(0, len(answer), step)])
    assert text_of(parts, Reasoning) == reasoning
    assert text_of(parts, Text) == text
    assert calls_of(parts) == calls


MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", CALL, "{", "}", "<", " ", "\n", "a", "Ω"]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(MARKS), max_size=12),
    st.data(),
    st.sampled_from([(), TOOLS]),
    st.sampled_from(["", "<think>\n"]),
)
def test_pieces_make_no_difference(words, data, tools, prompt_end):
    answer = "".join(words)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=8)))
    pieces = [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]

    def told(parts):
        return text_of(parts, Reasoning), text_of(parts, Text), calls_of(parts)

    assert told(parse(pieces, prompt_end, tools)) == told(parse([answer], prompt_end, tools))


def test_without_tools_text_is_text():
    answer = f"<tool_call>{CALL}</tool_call>"
    assert text_of(parse([answer], tools=()), Text) == answer


def test_the_prompt_may_have_begun_the_reasoning():
    parts = parse(["so", " it is</think>", "Yes"], "<|assistant|><think>\n")
    assert (text_of(parts, Reasoning), text_of(parts, Text)) == ("so it is", "Yes")


def test_text_comes_at_once():
    """Nothing is held back that cannot become a mark."""
    parser = MarkParser("", tools=())
    assert text_of(parser.feed("Hello"), Text) == "Hello"
    assert text_of(parser.feed(" you"), Text) == " you"


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"name": 1}', "[[[[", '{"name": "f", "arguments": 3}', "9" * 5000])
def test_what_is_no_call(text):
    assert read_calls(text) == []
