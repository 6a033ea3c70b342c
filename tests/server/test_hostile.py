"""Requests that mean harm, or were written in haste: each has an answer that says what is wrong, and costs little."""

from __future__ import annotations

import gzip
import json
import re
import tracemalloc

import httpx
import pytest

from offload_triforce.server.about import TokenBody
from offload_triforce.server.bodies import parse
from offload_triforce.server.chat import ChatRequest
from offload_triforce.server.completions import CompletionRequest
from offload_triforce.server.errors import ApiError
from offload_triforce.server.messages import MessagesRequest

CHAT, COMPLETIONS, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
USER = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def http(address):
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client


def post(http, path, **more):
    body = {"max_tokens": 2, **({"prompt": "Hello"} if path == COMPLETIONS else {"messages": USER}), **more}
    answer = http.post(path, json=body)
    return answer.status_code, answer.json().get("error", {}).get("message", "")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"stop": [None]}, "stop.0: input should be a valid string, not None"),
        ({"stop": {"a": 1}}, "stop: input should be a valid string, not an object with 1 entries"),
        ({"stop": "x" * 1001}, "stop holds a text of 1,001 characters, and 1,000 are the most"),
        ({"stop": ["x"] * 1000}, "stop has 1,000 texts"),
        ({"temperature": 1e-300}, "temperature: 1e-300 is too small; the least that is not 0 is 1e-30"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty: 1e-300 is too small"),
        ({"n": 0}, "n must be 1, not 0"),
        ({"max_tokens": -5}, "max_tokens: .* not -5"),
        ({"seed": 10**400}, "seed: .* not a number of 1,329 bits"),
        ({"logit_bias": {"05": 1}}, "'05' is no token id"),
        ({"logit_bias": {"\u0663": 1}}, "is no token id"),
        ({"logit_bias": {"5": "1"}}, "logit_bias: the bias of '5' must be a number from -100 to 100, not '1'"),
        ({"logit_bias": {"5": 101}}, "must be a number from -100 to 100, not 101"),
        ({"logit_bias": {"5": True}}, "must be a number from -100 to 100, not True"),
        ({"messages": [{"role": "user"}]}, "message 1 has no content"),
        ({"messages": []}, "messages: list should have at least 1 item, not 0$"),
        ({"chat_template_kwargs": {"x": [1]}}, "chat_template_kwargs: 'x' must be a text, a whole number, true, false"),
        ({"tool_choice": 1}, "tool_choice: input should be a valid string, not 1"),
        ({"tool_choice": {"type": []}}, "tool_choice must be 'none', 'auto', 'required' or a function's name"),
        ({"stream_options": []}, "stream_options: input should be an object"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_is_said_in_the_clients_own_words(http, more, said):
    status, message = post(http, CHAT, **more)
    assert status == 400
    assert re.search(said, message), message


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"tool_choice": {"type": ["any"]}}, "tool_choice.type must be auto, any, tool or none, not a list"),
        ({"tool_choice": {"type": {}}}, "tool_choice.type must be auto, any, tool or none, not an object"),
        ({"tool_choice": {"type": "tool", "name": 5}}, "tool_choice.name must be the name of a tool, not 5"),
        ({"thinking": {"type": 5}}, "thinking.type must be enabled, adaptive or disabled, not 5"),
        ({"thinking": {}}, "thinking.type must be enabled, adaptive or disabled, not None"),
        ({"stop_sequences": [""]}, "stop_sequences holds an empty text"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences has 17 texts"),
        ({"system": [{"type": "text"}, 1]}, "system.1: input should be an object, not 1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_so_it_is_in_messages(http, more, said):
    status, message = post(http, MESSAGES, **more)
    assert status == 400
    assert said in message, message


def test_stop_sequences_of_white_space_are_kept_to(http, engine):
    """They were left out once, without a word."""
    how = {"messages": [{"role": "user", "content": "Stop at a space"}], "temperature": 1.0, "max_tokens": 200}
    for seed in range(20):
        whole = http.post(MESSAGES, json={**how, "seed": seed}).json()["content"][0]["text"]
        if " " in whole[1:-1]:
            break
    answer = http.post(MESSAGES, json={**how, "seed": seed, "stop_sequences": [" "]}).json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", " ")
    assert "".join(block["text"] for block in answer["content"]) == whole[: whole.index(" ")]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    "more",
    [{"temperature": 1e-30}, {"repetition_penalty": 1e-30}, {"top_p": 0}, {"min_p": 1}, {"top_k": 2**31 - 1}],
    ids=str,
)
def test_what_is_extreme_and_possible(http, path, more):
    assert post(http, path, **more) == (200, "")


def test_everything_banned_is_an_answer_too(http, engine):
    bans = {str(token): -100 for token in range(engine.layout.vocabulary)}
    assert post(http, CHAT, logit_bias=bans) == (200, "")


@pytest.mark.parametrize(
    ("kind", "begin", "entry", "end"),
    [
        (TokenBody, b'{"tokens":[', b'"",', b"1]}"),
        (CompletionRequest, b'{"prompt":[', b"[],", b"1]}"),
        (ChatRequest, b'{"messages":[', b"1,", b"1]}"),
        (ChatRequest, b'{"messages":[{}],"stop":[', b"1,", b"1]}"),
        (ChatRequest, b'{"messages":[{}],"tools":[', b"1,", b"1]}"),
        (ChatRequest, b'{"messages":[{}],"modalities":[', b"1,", b"1]}"),
        (MessagesRequest, b'{"messages":[{}],"system":[', b"1,", b"1]}"),
        (MessagesRequest, b'{"messages":[{}],"stop_sequences":[', b"1,", b"1]}"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else value.decode()[-18:],
)
def test_a_list_of_mistakes_costs_no_more_than_one(kind, begin, entry, end):
    """A complaint about each entry takes hundreds of times the body's size."""
    body = begin + entry * 100_000 + end
    tracemalloc.start()
    try:
        with pytest.raises(ApiError):
            parse(kind, body)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 40 * len(body)


@pytest.mark.parametrize("name", ["logit_bias", "chat_template_kwargs"])
def test_so_does_an_object_of_them(name):
    body = json.dumps({"messages": USER, name: {str(number): [] for number in range(50_000)}}).encode()
    tracemalloc.start()
    try:
        with pytest.raises(ApiError, match="'0' must be"):
            parse(ChatRequest, body)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 40 * len(body)


def test_compressed_bodies_are_refused_by_name(http):
    body = gzip.compress(json.dumps({"messages": USER, "max_tokens": 1}).encode())
    for path in (CHAT, "/tokenize", "/page/pdf"):
        answer = http.post(path, content=body, headers={"Content-Encoding": "gzip"})
        assert answer.status_code == 415, path
        assert "Content-Encoding 'gzip' is not read here" in answer.json()["error"]["message"]
    plain = {"messages": USER, "max_tokens": 1}
    assert http.post(CHAT, json=plain, headers={"Content-Encoding": "identity"}).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/json; charset=x", ""])
def test_the_content_type_says_nothing(http, kind):
    body = json.dumps({"messages": USER, "max_tokens": 1})
    assert http.post(CHAT, content=body, headers={"Content-Type": kind}).status_code == 200


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        (CHAT, "POST"),
        (MESSAGES, "POST"),
        ("/v1/models", "GET, HEAD"),
        ("/v1/models/tiny", "GET, HEAD"),
        ("/metrics", "GET, HEAD"),
        ("/", "GET, HEAD"),
    ],
)
def test_other_methods(http, path, allowed):
    for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        answer = http.request(method, path)
        if method in allowed.split(", "):
            assert answer.status_code < 405, method
            continue
        assert answer.status_code == 405, method
        assert answer.headers["allow"] == allowed
        assert method == "HEAD" or f"{method} is not possible at '{path}'" in answer.json()["error"]["message"]
    assert http.get("/v1/nothing").status_code == 404
