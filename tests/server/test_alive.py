"""Streams that have nothing to say yet show that they live: to proxies, which would cut them."""

from __future__ import annotations

import asyncio
import threading
import time

import httpx
import pytest

from offload_triforce.server.reporter import Reporter
from offload_triforce.server.streaming import ALIVE, PING, kept_alive
from tests.server.conftest import serving
from tests.server.scripted import FOUND, scripted_engine

CHAT, COMPLETIONS, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
SIGNS = {CHAT: ": still here", COMPLETIONS: ": still here", MESSAGES: "event: ping"}
PATHS = pytest.mark.parametrize("path", SIGNS)
TOOL = {"name": "weather", "parameters": {"type": "object"}, "input_schema": {"type": "object"}}
ENOUGH = 3  # signs of life


@pytest.fixture(scope="module")
def engine():
    with scripted_engine() as engine:
        yield engine


@pytest.fixture
def impatient(engine):
    with serving(engine, ping_seconds=0.02) as (address, service), httpx.Client(base_url=address, timeout=60) as http:
        yield http, service


def body(path, **more):
    """A prompt of several chunks; the answer is ``FOUND`` in chats."""
    text = "".join(chr(97 + i * i % 26) for i in range(300))
    how = {"max_tokens": 60, "temperature": 0, "stream": True, **more}
    if path == COMPLETIONS:
        return {"prompt": text, **how}
    result = {"role": "tool", "content": text, "tool_call_id": "x"}
    if path == MESSAGES:
        result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x", "content": text}]}
    tool = TOOL if path == MESSAGES else {"type": "function", "function": TOOL}
    return {"messages": [{"role": "user", "content": "Weather?"}, result], "tools": [tool], **how}


def lines_of(http, path, sees=lambda line: None, **more):
    with http.stream("POST", path, json=body(path, **more)) as answer:
        assert answer.status_code == 200
        lines = []
        for line in answer.iter_lines():
            lines.append(line)
            sees(line)
    return lines


def until(sign, enough):
    """(what sees lines, what is set once ``sign`` has come often enough)."""
    seen, signs = threading.Event(), []

    def sees(line):
        signs.append(line == sign)
        if sum(signs) >= enough:
            seen.set()

    return sees, seen


@PATHS
def test_while_the_prompt_is_read(impatient, monkeypatch, path):
    """The prefill does not go on before there have been signs of life."""
    sees, seen = until(SIGNS[path], ENOUGH)
    progress, waited = Reporter.progress, []

    def slow(self, done, steps):
        progress(self, done, steps)
        waited.append(seen.wait(30))

    monkeypatch.setattr(Reporter, "progress", slow)
    lines = lines_of(impatient[0], path, sees)
    assert waited
    assert all(waited)
    assert lines.count(SIGNS[path]) >= ENOUGH
    assert not any("prompt_progress" in line for line in lines), "nobody has asked for it"
    assert path == COMPLETIONS or any(FOUND in line for line in lines)


@PATHS
def test_while_the_prompt_is_read_quickly_chunk_by_chunk(impatient, monkeypatch, path):
    """What happens without being told is no sign of life: progress that nobody asked for comes all the time."""
    sees, seen = until(SIGNS[path], ENOUGH)
    progress = Reporter.progress

    def busy(self, done, steps):
        for _ in range(3000):
            progress(self, done, steps)
            if seen.wait(0.005):
                return
        raise AssertionError("no sign of life")

    monkeypatch.setattr(Reporter, "progress", busy)
    lines = lines_of(impatient[0], path, sees)
    assert lines.count(SIGNS[path]) >= ENOUGH
    assert not any("error" in line for line in lines)


@PATHS
def test_while_it_waits_for_its_turn(impatient, monkeypatch, path):
    http, service = impatient
    sees, seen = until(SIGNS[path], ENOUGH)
    progress = Reporter.progress

    def slow(self, done, steps):
        """The first one's prompt is read until the second has seen signs of life."""
        assert seen.wait(30)
        progress(self, done, steps)

    monkeypatch.setattr(Reporter, "progress", slow)
    first = threading.Thread(target=lines_of, args=(http, CHAT))
    first.start()
    while not service.line.busy:
        time.sleep(0.005)
    lines = lines_of(http, path, sees)
    first.join()
    assert lines.count(SIGNS[path]) >= ENOUGH
    assert path == COMPLETIONS or any(FOUND in line for line in lines)


def test_it_is_what_is_sent_that_counts():
    """A part that comes at once is not held back, and none is lost to a sign of life."""

    async def parts():
        yield b"a"
        await asyncio.sleep(0.2)
        yield b"b"
        yield b"c"

    async def work(sign):
        return [part async for part in kept_alive(parts(), 0.02, sign)]

    for sign in (ALIVE, PING):
        told = asyncio.run(work(sign))
        assert [part for part in told if part != sign] == [b"a", b"b", b"c"]
        assert told[0] == b"a"
        assert told[-2:] == [b"b", b"c"]
        assert sign in told[1:-2]


def test_what_goes_wrong_is_raised_and_what_is_left_is_closed():
    closed = []

    async def parts():
        try:
            yield b"a"
            await asyncio.sleep(60)
        finally:
            closed.append(True)

    async def wrong():
        yield b"a"
        raise ValueError("wrong")

    async def leave():
        stream = kept_alive(parts(), 0.01, ALIVE)
        assert [await anext(stream), await anext(stream)] == [b"a", ALIVE]
        await stream.aclose()
        assert closed == [True]
        with pytest.raises(ValueError, match="wrong"):
            async for _ in kept_alive(wrong(), 1, ALIVE):
                pass

    asyncio.run(leave())
