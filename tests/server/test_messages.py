"""Anthropic's way, by Anthropic's own client."""

from __future__ import annotations

import httpx
import pytest

from tests.server.conftest import anthropic_client

anthropic = pytest.importorskip("anthropic")

TOKENS = 24
DRAWN = {"seed": 1, "temperature": 1.0}
USER = {"role": "user", "content": "What is the weather like?"}
TOOL = {
    "name": "weather",
    "description": "Of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def claude(address):
    with anthropic_client(address) as client:
        yield client


def ask(client, messages=(USER,), **options):
    options = {"max_tokens": TOKENS, "extra_body": DRAWN, **options}
    return client.messages.create(model="tiny", messages=list(messages), **options)


def own(engine, messages, **options):
    ids = engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return engine.generate(ids, **{"seed": 1, "temperature": 1.0, "max_new_tokens": TOKENS, **options})


def test_an_answer_is_the_engines_own(claude, engine):
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    answer = ask(claude, system=system)
    expected = own(engine, [{"role": "system", "content": "Be brief."}, USER])
    assert [block.text for block in answer.content] == [expected.text]
    assert answer.stop_reason == "max_tokens"
    assert answer.usage.input_tokens + answer.usage.cache_read_input_tokens == len(expected.prompt_ids)
    assert answer.usage.output_tokens == TOKENS
    counted = claude.messages.count_tokens(model="tiny", messages=[USER], system="Be brief.")
    assert counted.input_tokens == len(expected.prompt_ids)


def test_a_stream_is_the_same_answer(claude, engine):
    how = {"max_tokens": TOKENS, "extra_body": DRAWN}
    with claude.messages.stream(model="tiny", messages=[USER], **how) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == own(engine, [USER]).text == final.content[0].text
    assert final.stop_reason == "max_tokens"
    assert final.usage.output_tokens == TOKENS


def test_stop_sequences(claude, engine):
    whole = own(engine, [USER]).text
    stop = next(whole[i : i + 2] for i in range(3, len(whole)) if whole[i : i + 2].strip() == whole[i : i + 2])
    answer = ask(claude, stop_sequences=[stop])
    assert answer.content[0].text == whole[: whole.index(stop)]
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)


def test_a_round_trip_with_a_tool(claude):
    pytest.importorskip("llguidance")
    answer = ask(claude, tools=[TOOL], tool_choice={"type": "any"}, max_tokens=400)
    assert answer.stop_reason == "tool_use"
    (call,) = answer.content
    assert call.name == "weather"
    assert call.input["city"] in ("Rome", "Oslo")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "Sunny."}]}
    turns = [USER, {"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    after = ask(claude, turns, tools=[TOOL])
    assert after.role == "assistant"
    with claude.messages.stream(
        model="tiny", messages=[USER], tools=[TOOL], tool_choice={"type": "tool", "name": "weather"}, max_tokens=400
    ) as stream:
        final = stream.get_final_message()
    assert final.content[0].input["city"] in ("Rome", "Oslo")


def test_errors_have_anthropics_shape(claude):
    with pytest.raises(anthropic.NotFoundError) as caught:
        claude.messages.create(model="nope", messages=[USER], max_tokens=1)
    assert caught.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="only text can be read"):
        ask(claude, [{"role": "user", "content": [{"type": "image", "source": {}}]}])
    with pytest.raises(anthropic.BadRequestError, match="max_tokens is missing"):
        claude.post("/v1/messages", body={"model": "tiny", "messages": [USER]}, cast_to=object)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("output_config", {"format": {"type": "json_schema", "schema": {}}}),
        ("context_management", {"edits": [{"type": "clear_tool_uses_20250919"}]}),
        ("n", 3),
        ("skip_special_tokens", False),
    ],
)
def test_what_would_change_the_answer_is_refused(address, name, value):
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, name: value}
    answer = httpx.post(f"{address}/v1/messages", json=body, timeout=60)
    assert answer.status_code == 400
    assert name in answer.json()["error"]["message"]


def test_what_changes_nothing_is_taken(address):
    """As agents send it."""
    edits = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "context_management": edits}
    body |= {"output_config": {"effort": "high"}, "betas": ["x"]}
    assert httpx.post(f"{address}/v1/messages", json=body, timeout=60).status_code == 200


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
@pytest.mark.parametrize("content", [[], ""])
def test_a_message_that_holds_nothing(address, path, content):
    answer = httpx.post(
        address + path, json={"messages": [{"role": "user", "content": content}], "max_tokens": 1}, timeout=60
    )
    assert answer.status_code in (200, 400)
    if content == []:
        assert "nothing that could be answered" in answer.json()["error"]["message"]
