"""Answers taken apart by the tokenizer's own response template, where transformers has them."""

from __future__ import annotations

import json

import pytest

from offload_triforce.server.replies import Reasoning, Text, ToolCall, text_of
from offload_triforce.server.template_replies import TemplateParser, has_response_template
from tests.byte_tokenizer import byte_tokenizer

TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "[assistant]",
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>"},
        "content": {},
        "tool_calls": {"open": "<tool_call>", "close": "</tool_call>", "content": "json", "repeats": True},
    },
}
ANSWER = '<think>Hm</think>Well.<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'


@pytest.fixture
def tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.response_template = TEMPLATE
    if not has_response_template(tokenizer):
        pytest.skip("this release of transformers has no response templates")
    return tokenizer


@pytest.mark.parametrize("step", [1, 5, 500])
def test_parts(tokenizer, step):
    parser = TemplateParser(tokenizer, "[user] Hi [assistant]", [])
    parts = [p for i in range(0, len(ANSWER), step) for p in parser.feed(ANSWER[i : i + step])] + parser.finish()
    assert text_of(parts, Reasoning) == "Hm"
    assert text_of(parts, Text) == "Well."
    (call,) = [part for part in parts if isinstance(part, ToolCall)]
    assert (call.name, json.loads(call.arguments)) == ("f", {"x": 1})


def test_what_it_cannot_read_is_text(tokenizer):
    parser = TemplateParser(tokenizer, "[assistant]", [])
    parts = parser.feed("<tool_call>{nothing}</tool_call> and so on") + parser.finish()
    assert "and so on" in text_of(parts, Text)
    assert not any(isinstance(part, ToolCall) for part in parts)


def test_without_one():
    assert not has_response_template(byte_tokenizer())
