"""Hundreds of requests of all kinds, many of which go wrong: nothing grows, nothing is stuck, answers stay right."""

from __future__ import annotations

import gc
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from tests.server.conftest import serving, tiny_engine

CHAT = "/v1/chat/completions"
REQUESTS, WORKERS = 500, 12
GROWTH = 40 << 20  # bytes from the first half to the second; 19 MB and less were measured, and no Python object more


def body(rng, **more):
    text = "".join(rng.choice("abcdefgh ") for _ in range(rng.randrange(5, 300)))
    return {"messages": [{"role": "user", "content": text}], "max_tokens": rng.randrange(1, 30), "seed": 1, **more}


def one(address, number):
    """One request, of a kind that its number decides; returns its status, or None where it was given up."""
    rng = random.Random(number)
    with httpx.Client(base_url=address, timeout=120) as http:
        kind = rng.randrange(5)
        if kind == 0:
            return http.post(CHAT, content=rng.randbytes(50)).status_code
        if kind == 1:
            return http.post("/v1/messages", json=body(rng)).status_code
        if kind == 2:
            with http.stream("POST", CHAT, json=body(rng, stream=True, max_tokens=500)) as answer:
                for _, line in zip(range(rng.randrange(1, 6)), answer.iter_lines(), strict=False):
                    assert '"error"' not in line, line
            return None
        if kind == 3:
            try:
                return http.post(CHAT, json=body(rng, max_tokens=500), timeout=0.05).status_code
            except httpx.TimeoutException:
                return None
        return http.post(CHAT, json=body(rng, temperature=0)).status_code


@pytest.mark.slow
def test_soak():
    question = {"messages": [{"role": "user", "content": "The same as ever"}], "max_tokens": 20, "temperature": 0}
    with tiny_engine() as engine, serving(engine, queue=100) as (address, service):
        before = httpx.post(address + CHAT, json=question, timeout=60).json()["choices"]
        sizes, held = [], []
        for part in range(2):
            with ThreadPoolExecutor(WORKERS) as pool:
                numbers = range(part * REQUESTS // 2, (part + 1) * REQUESTS // 2)
                statuses = list(pool.map(lambda number: one(address, number), numbers))
            assert set(statuses) <= {None, 200, 400}
            deadline = time.monotonic() + 60
            while service.line.busy and time.monotonic() < deadline:
                time.sleep(0.05)
            assert not service.line.busy
            gc.collect()
            held.append(len(gc.get_objects()))
            sizes.append((psutil.Process().memory_info().rss, threading.active_count()))
        assert httpx.post(address + CHAT, json=question, timeout=60).json()["choices"] == before
        assert sizes[1][0] < sizes[0][0] + GROWTH
        assert sizes[1][1] <= sizes[0][1] + 2
        assert held[1] < held[0] + 1000, "less than four objects for each request"
        assert not service._tasks
