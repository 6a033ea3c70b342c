"""What is refused, and how: in OpenAI's shape, with the figure; never by a 500."""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import socket
import threading
import time

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload_triforce import InputError
from offload_triforce.server import auth
from offload_triforce.server.errors import ApiError
from offload_triforce.server.line import Line
from offload_triforce.server.options import ServerOptions
from tests.server.conftest import serving

USER = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def http(address):
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client


def refusal(http, body, path=CHAT):
    sent = body if isinstance(body, (str, bytes)) else json.dumps(body)
    answer = http.post(path, content=sent)
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    return answer.status_code, answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("{", 400, "the body is not JSON"),
        ("[]", 400, "valid dictionary|object"),
        ({}, 400, "messages: field required"),
        ({"messages": []}, 400, "messages: .*at least 1"),
        ({"messages": "hi"}, 400, "messages: .*array, not 'hi'"),
        ({"messages": [{"role": "king", "content": "x"}]}, 400, "role of message 1 must be one of"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, "content of message 1 must be a text, not 3"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "only text can be read"),
        ({"messages": USER, "temperature": "hot"}, 400, "temperature: .*number, not 'hot'"),
        ({"messages": USER, "temperature": -1}, 400, "temperature: .*greater than or equal to 0, not -1"),
        ({"messages": USER, "top_p": 2}, 400, "top_p: .*less than or equal to 1, not 2"),
        ({"messages": USER, "n": 2}, 400, "n must be 1, not 2"),
        ({"messages": USER, "max_tokens": 0}, 400, "max_tokens: .*, not 0"),
        ({"messages": USER, "max_tokens": 3000}, 400, "exceed the model's positions, 2,048, by 9"),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, 400, "shorten the prompt by"),
        ({"messages": USER, "stop": ["a"] * 20}, 400, "stop has 20 texts, and at most 16"),
        ({"messages": USER, "stop": ""}, 400, "empty text"),
        ({"messages": USER, "logit_bias": {"9999": 1}}, 400, "'9999' is no token id; the model has 0 to 258"),
        ({"messages": USER, "functions": [{"name": "f"}]}, 400, "'functions' is not supported, and might change"),
        ({"messages": USER, "top_logprobs": 2}, 400, "needs logprobs"),
        ({"messages": USER, "chat_template_kwargs": {"chat_template": "x"}}, 400, "set by the server"),
        ({"messages": USER, "model": "gpt"}, 404, "'gpt' is not served here"),
    ],
    ids=str,
)
def test_refusals(http, body, status, said):
    found, message = refusal(http, body)
    assert found == status
    assert re.search(said, message), message


def test_a_prompt_that_is_too_long_has_the_code_that_agents_know(http):
    answer = http.post(CHAT, json={"messages": [{"role": "user", "content": "x" * 3000}]})
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert "the prompt is too long: " in answer.json()["error"]["message"]
    room = http.post(CHAT, json={"messages": USER, "max_tokens": 3000}).json()["error"]
    assert room["code"] == "context_length_exceeded"
    assert "too long" not in room["message"], "a smaller max_tokens would do"


def test_parameters_that_change_nothing_are_accepted(http):
    harmless = {"user": "me", "store": True, "metadata": {"a": "b"}, "functions": None, "audio": {}, "n": 1}
    answer = http.post(CHAT, json={"messages": USER, "max_tokens": 1, **harmless})
    assert answer.status_code == 200


def test_elsewhere(http):
    assert refusal(http, {}, "/v1/nothing")[0] in (404, 405)
    assert http.get("/v1/chat/completions").status_code in (404, 405)
    assert http.get("/health").json()["status"] == "ok"
    assert http.head("/health").status_code == 200
    odd = http.get("/page/live?timeline=perhaps")
    assert odd.status_code == 400
    assert odd.json()["error"]["param"] == "timeline"
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Key": "a" * 24,
        "Sec-WebSocket-Version": "13",
    }
    assert http.get(CHAT, headers=upgrade).status_code in (404, 405)
    assert http.options(CHAT).status_code == 405
    assert http.get("/..%2f..%2fetc/passwd").status_code == http.get("/%00").status_code == 404
    assert "offload_triforce_new_tokens_total" in http.get("/metrics").text


def test_tokens(http, engine):
    tokens = http.post("/tokenize", json={"content": "Hello, ü"}).json()["tokens"]
    assert tokens == engine.tokenizer("Hello, ü").input_ids
    assert http.post("/detokenize", json={"tokens": tokens}).json()["content"] == "Hello, ü"
    assert refusal(http, {"tokens": [259]}, "/detokenize")[0] == 400
    assert refusal(http, {}, "/tokenize")[0] == 400


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    [
        "model",
        "messages",
        "prompt",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "stop",
        "max_tokens",
        "n",
        "stream",
        "stream_options",
        "logprobs",
        "tools",
        "tool_choice",
        "response_format",
        "logit_bias",
        "system",
        "thinking",
        "content",
        "tokens",
        "presence_penalty",
    ]
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool", "x"]), "content": VALUES}),
    min_size=1,
    max_size=3,
)
PATHS = st.sampled_from(
    [CHAT, "/v1/completions", "/v1/messages", "/tokenize", "/detokenize", "/v1/messages/count_tokens"]
)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(PATHS, st.dictionaries(NAMES | st.text(max_size=5), VALUES, max_size=5), st.none() | MESSAGES, st.booleans())
def test_no_body_makes_a_500(http, path, body, messages, plain):
    body = {"max_tokens": 2, **body} | ({"messages": messages} if messages else {}) | ({"prompt": "a"} if plain else {})
    answer = http.post(path, content=json.dumps(body))
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(PATHS, st.binary(max_size=60))
def test_nor_do_bytes(http, path, body):
    assert http.post(path, content=body).status_code in (200, 400, 404)


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b'{"messages":' * 5000, b'{"seed": ' + b"9" * 10_000 + b"}", b'"\\ud800"']
)
def test_nor_what_is_deep_or_long(http, body):
    assert refusal(http, body)[0] == 400
    assert refusal(http, b'{"messages": [{"role": "user", "content": "\\ud800"}]}')[0] == 400


def test_keys(engine):
    guarded = {"api_key": "secret-of-mine", "cors": ("https://good.example",)}
    with serving(engine, **guarded) as (address, _), httpx.Client(base_url=address) as http:
        assert http.get("/v1/models").status_code == 401
        for name, value, status in (
            ("Authorization", "Bearer secret-of-mine", 200),
            ("Authorization", "Bearer secret-of-min", 401),
            ("Authorization", "Basic secret-of-mine", 401),
            ("x-api-key", "secret-of-mine", 200),
            ("x-api-key", "\u00fc".encode(), 401),
        ):
            assert http.get("/v1/models", headers={name: value}).status_code == status, (name, value)
        assert http.get("/health").status_code == 200
        assert http.get("/metrics").status_code == 401
        key = {"x-api-key": "secret-of-mine"}
        assert http.get("/v1/models", headers={**key, "Origin": "https://bad.example"}).status_code == 403
        good = http.get("/v1/models", headers={**key, "Origin": "https://good.example"})
        assert good.headers["access-control-allow-origin"] == "https://good.example"


def test_keys_are_compared_in_constant_time(engine, monkeypatch):
    """Digests of one length, as a whole, whatever a key begins with; and never by ==."""
    compared, compare = [], hmac.compare_digest
    monkeypatch.setattr(auth.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or compare(a, b))
    key = "secret-of-mine"
    shown = ["s", key[:-1], key + "x", "x" * 5000, "\u00fc"]
    with serving(engine, api_key=key) as (address, _), httpx.Client(base_url=address) as http:
        for each in shown:
            answer = http.get("/v1/models", headers={"Authorization": b"Bearer " + each.encode()})
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert len(each) < 2 or each not in answer.text
        twice = [("Authorization", "Bearer wrong"), ("Authorization", f"Bearer {key}")]
        assert http.get("/v1/models", headers=twice).status_code == 401, "the first one counts"
    assert len(compared) == len(shown) + 1
    assert {type(part) for pair in compared for part in pair} == {bytes}
    assert {len(part) for pair in compared for part in pair} == {32}
    assert not any(key.encode() in part for pair in compared for part in pair)


def test_keys_are_in_no_log(engine, caplog, capsys):
    """Nor in what describes the options, which ends up in tracebacks."""
    key = "secret-of-mine"
    assert key not in repr(ServerOptions(("m",), api_key=key))
    with (
        caplog.at_level("DEBUG"),
        serving(engine, api_key=key) as (address, _),
        httpx.Client(base_url=address) as http,
    ):
        caplog.clear()
        for header in ({"Authorization": f"Bearer {key}"}, {"x-api-key": key}, {"x-api-key": f"{key}-not"}):
            http.get("/v1/models", headers=header)
            http.post(CHAT, headers=header, json={"messages": USER, "max_tokens": 1, "temperature": "hot"})
            http.get("/metrics", headers=header)
    said = [record.getMessage() + repr(record.args) for record in caplog.records if not record.name.startswith("http")]
    assert not any(key in each for each in said)
    assert key not in "".join(capsys.readouterr())


def test_pages_of_other_sites_are_let_in_only_where_that_is_asked_for(engine, http):
    """No answer without --cors has a header that lets a page read it, and no preflight succeeds."""
    ask = {"Origin": "https://good.example", "Access-Control-Request-Method": "POST"}
    for answer in (http.options(CHAT, headers=ask), http.get("/v1/models", headers=ask), http.get("/health")):
        assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert http.options(CHAT, headers=ask).status_code == 405
    guarded = {"api_key": "secret-of-mine", "cors": ("https://good.example",)}
    with serving(engine, **guarded) as (address, _), httpx.Client(base_url=address) as other:
        allowed = other.options(CHAT, headers={**ask, "Access-Control-Request-Headers": "authorization"})
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://good.example"
        assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
        assert other.options(CHAT, headers={**ask, "Origin": "https://bad.example"}).status_code == 400


def test_requests_are_answered_in_the_order_in_which_they_came(engine):
    """Whatever they ask for, and whichever way."""
    with serving(engine) as (address, service), httpx.Client(base_url=address, timeout=60) as http:
        ended, threads = [], []
        begun, begin = [], service.begun

        def seen(stats):
            begun.append(stats)  # which are filled while it goes on
            begin(stats)

        service.begun = seen

        def one(number, path):
            text = "x" * (10 + number)
            body = {"prompt": text} if path == "/v1/completions" else {"messages": [{"role": "user", "content": text}]}
            http.post(path, json={"max_tokens": 400 if number == 0 else 20 - number, "temperature": 1.0, **body})
            ended.append(number)

        for number in range(12):
            path = (CHAT, "/v1/completions", "/v1/messages")[number % 3]
            threads.append(threading.Thread(target=one, args=(number, path)))
            threads[-1].start()
            deadline = time.monotonic() + 20
            while len(service.line._places) + len(ended) <= number and time.monotonic() < deadline:
                time.sleep(0.002)
        for thread in threads:
            thread.join()
    lengths = [stats.prompt_tokens for stats in begun]
    completions = [number for number in range(12) if number % 3 == 1]
    overhead = lengths[0] - 10  # tokens of the template
    expected = [10 + number + (0 if number in completions else overhead) for number in range(12)]
    assert lengths == expected


def test_pages_of_others_stay_out_without_a_key(http, address):
    assert http.get("/v1/models", headers={"Origin": "https://evil.example"}).status_code == 403
    assert http.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403
    assert http.get("/v1/models", headers={"Origin": address}).status_code == 200


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"host": "0.0.0.0"}, "lets other machines in, so an API key is needed"),
        ({"host": "example.com"}, "an API key is needed"),
        ({"api_key": "short"}, "at least 8 ASCII characters, not 5"),
        ({"queue": -1}, "queue must be at least 0, not -1"),
    ],
    ids=str,
)
def test_options(options, said):
    with pytest.raises(InputError, match=said):
        ServerOptions(("m",), **options)


def test_a_full_line_says_when_to_come_back(engine):
    with serving(engine, queue=1) as (address, service), httpx.Client(base_url=address, timeout=60) as http:
        long = {"messages": USER, "max_tokens": 1500, "stream": True}
        with http.stream("POST", CHAT, json=long) as first, http.stream("POST", CHAT, json=long) as second:
            assert first.status_code == second.status_code == 200
            answer = http.post(CHAT, json=long)
            assert answer.status_code == 429
            assert int(answer.headers["Retry-After"]) >= 1
            assert answer.json()["error"]["code"] == "queue_full"
        deadline = time.monotonic() + 20
        while service.line.busy and time.monotonic() < deadline:
            time.sleep(0.01)
        assert http.post(CHAT, json={"messages": USER, "max_tokens": 1}).status_code == 200


def test_big_and_slow_bodies_are_cut(engine):
    with serving(engine, body_bytes=2000, read_seconds=0.5) as (address, _), httpx.Client(base_url=address) as http:
        assert refusal(http, "x" * 2001)[0] == 413
        assert http.post(CHAT, content=(b"x" * 500 for _ in range(9))).status_code == 413
        where = ("127.0.0.1", int(address.rpartition(":")[2]))
        heads = {
            b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X-Flood: 1\r\n" * 9000: b"HTTP/1.1 4",
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{": b"HTTP/1.1 408",
            b"POST /v1/chat/comp": b"",
            b"": b"",
        }
        for head, begins in heads.items():
            with socket.create_connection(where, timeout=20) as slow:
                slow.sendall(head)
                assert slow.recv(1000).startswith(begins)


def test_the_line_is_first_come_first_served():
    async def work():
        line, order = Line(2), []
        places = [line.join() for _ in range(3)]
        with pytest.raises(ApiError):
            line.join()

        async def go(number):
            await places[number].turn()
            order.append(number)
            places[number].leave()

        tasks = [asyncio.create_task(go(number)) for number in (2, 1)]
        await asyncio.sleep(0)
        assert order == []
        places[0].leave()
        places[0].leave()
        await asyncio.gather(*tasks)
        assert order == [1, 2]
        assert not line.busy

    asyncio.run(work())
