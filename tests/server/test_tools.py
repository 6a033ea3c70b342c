"""Tools and shapes of answers, by OpenAI's client: a random model is held to them by grammars."""

from __future__ import annotations

import json

import openai
import pytest
import torch

from offload_triforce import TriForce
from offload_triforce.server.chat import ChatRequest
from offload_triforce.server.conversation import prepare
from offload_triforce.server.options import ServerOptions
from offload_triforce.server.service import Service
from offload_triforce.server.structured import AfterReasoning
from tests.byte_tokenizer import byte_tokenizer
from tests.server.conftest import SMALL, TEMPLATE
from tests.tiny import build

pytest.importorskip("llguidance")

CITIES = ["Rome", "Oslo", "Lima"]


def tool(name="weather"):
    parameters = {
        "type": "object",
        "properties": {"city": {"enum": CITIES}},
        "required": ["city"],
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": "Of a city.", "parameters": parameters}}


SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": CITIES}, "sure": {"type": "boolean"}},
    "required": ["city", "sure"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "guess", "schema": SCHEMA}}
USER = {"role": "user", "content": "What is the weather like?"}


def ask(client, messages=(USER,), **options):
    options = {"temperature": 1.0, "max_tokens": 400, "seed": 1, **options}
    return client.chat.completions.create(model="tiny", messages=list(messages), **options)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str)
def test_a_round_trip_with_a_tool(client, choice):
    answer = ask(client, tools=[tool(), tool("other")] if isinstance(choice, dict) else [tool()], tool_choice=choice)
    choice_made = answer.choices[0]
    assert choice_made.finish_reason == "tool_calls"
    (call,) = choice_made.message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in CITIES
    assert choice_made.message.content is None
    result = {"role": "tool", "tool_call_id": call.id, "content": "Sunny."}
    after = ask(client, [USER, choice_made.message.model_dump(exclude_none=True), result], tools=[tool()], max_tokens=8)
    assert after.choices[0].message.role == "assistant"
    assert after.usage.prompt_tokens > answer.usage.prompt_tokens


def test_a_call_comes_in_a_stream(client):
    chunks = list(ask(client, tools=[tool()], tool_choice="required", stream=True))
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [call.index for call in calls] == [0]
    assert json.loads("".join(call.function.arguments for call in calls))["city"] in CITIES
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)


def test_tools_change_the_prompt_unless_none_is_to_be_called(client):
    plain = ask(client, max_tokens=1).usage.prompt_tokens
    assert ask(client, tools=[tool()], max_tokens=1).usage.prompt_tokens > plain
    assert ask(client, tools=[tool()], tool_choice="none", max_tokens=1).usage.prompt_tokens == plain


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_json_schema(client, seed):
    found = json.loads(ask(client, response_format=FORMAT, seed=seed).choices[0].message.content)
    assert set(found) == {"city", "sure"}
    assert found["city"] in CITIES


def test_constrained_drafts_change_nothing(client, service, engine):
    """The answer is the one that plain decoding gives under the same grammar; and there were drafts."""
    body = ChatRequest(messages=[USER], response_format=FORMAT, seed=5, temperature=1.0)
    question = prepare(service, body.conversation(), body, 400, None)
    with TriForce(engine.model, engine.tokenizer, gamma=0) as plain:
        expected = plain.generate(
            question.request.prompt,
            seed=5,
            temperature=1.0,
            max_new_tokens=400,
            logits_processor=[question.request.processors[0].fork()],
        )
    assert ask(client, response_format=FORMAT, seed=5).choices[0].message.content == expected.text
    assert service.stats.draft_tokens > 0
    assert service.stats.target_only == ()


def test_json_object(client):
    answer = ask(client, response_format={"type": "json_object"}, max_tokens=20)
    assert answer.choices[0].message.content.lstrip().startswith("{")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type must be one of text, json_object, json_schema"),
        ({"response_format": {"type": "json_schema"}}, "schema is missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}}},
            "the schema cannot be kept to: .*Invalid type: no",
        ),
        ({"tools": [{"type": "retrieval"}]}, "tool 1 must be a function with a name"),
        ({"tools": [tool()], "tool_choice": "always"}, "tool_choice must be"),
        ({"tool_choice": "required"}, "tools has no such tool"),
        ({"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "asks for 'x'"),
        ({"tools": [tool()], "tool_choice": "required", "response_format": FORMAT}, "exclude each other"),
    ],
    ids=range(8),
)
def test_refusals(client, options, said):
    with pytest.raises(openai.BadRequestError, match=said):
        ask(client, extra_body=options)


def test_a_grammar_begins_behind_the_reasoning():
    """And drafts keep to it wherever the reasoning ends on their own path: the answer is that of plain decoding."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = TEMPLATE.replace("[assistant] ", "[assistant] <think>")
    model = build("Llama", vocab_size=261, eos_token_id=2)
    close = tokenizer.convert_tokens_to_ids("</think>")
    body = {"response_format": FORMAT, "logit_bias": {str(close): 5.0}, "temperature": 1.0}
    answers = []
    for gamma in (0, 6):
        with TriForce(model, tokenizer, draft="self", **{**SMALL, "gamma": gamma}) as engine:
            service = Service(engine, ServerOptions(("tiny",)))
            for seed in range(4):
                asked = ChatRequest(messages=[USER], seed=seed, **body)
                question = prepare(service, asked.conversation(), asked, 400, None)
                stream = engine.run(question.request, seed)
                answers.append("".join(stream))
                assert gamma == 0 or stream.stats.target_only == ()
    assert answers[:4] == answers[4:]
    for answer in answers:
        _, mark, shape = answer.partition("</think>")
        assert mark
        assert json.loads(shape)["city"] in CITIES
    assert any(answer.partition("</think>")[0] for answer in answers)


def test_a_fork_of_it_goes_its_own_way():
    calls = []

    class Grammar:
        def __call__(self, ids, scores):
            calls.append(self)
            return scores

        def fork(self):
            return Grammar()

    first = AfterReasoning(Grammar(), close=7)
    twin = first.fork()
    ids, scores = torch.tensor([[1, 7]]), torch.zeros(1, 9)
    twin(ids, scores)
    first(ids[:, :1], scores)
    assert len(calls) == 1
    first(ids, scores)
    assert calls[0] is not calls[1]
