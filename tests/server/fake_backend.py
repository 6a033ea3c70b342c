"""A server without a model, for the page: it says what it is asked to say, slowly enough to be watched.

By itself, to work on the page: python -m tests.server.fake_backend
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
import time
from types import SimpleNamespace

import torch
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles

from offload_triforce.planner.sizes import Needs
from offload_triforce.scheduler.device import COMPUTE, DRAFT, H2D, VERIFY
from offload_triforce.scheduler.trace import Span
from offload_triforce.server.app import GUARD, PAGE
from offload_triforce.server.live import live_router
from offload_triforce.server.pdf import pdf_router
from offload_triforce.speculation.stats import DecodeStats


class Device:
    """What it has traced is always the same pass."""

    def __init__(self):
        self.trace = None

    def record(self):
        for i in range(8):
            self.trace.add(Span(H2D, "tile", 0.010 * i, 0.010 * i + 0.0095, 2_000_000))
            self.trace.add(Span(COMPUTE, "tile", 0.010 * i + 0.010, 0.010 * i + 0.014))
        self.trace.add(Span(DRAFT, "3 tokens", 0.016, 0.019))
        self.trace.add(Span(VERIFY, "9 tokens", 0.0, 0.090))


class Caches:
    """A runtime's figures; those of a large model, so that the page has something to show."""

    def __init__(self):
        self.device, self.context = Device(), 262_144
        host, caches = {"tiles of the full cache": 17_000_000_000}, {"ring": 128_000_000}
        self.needs = Needs(host, caches, {"hidden states": 400_000_000}, {"logits of a pass": 90_000_000})


class Backend:
    """What tests set: ``script`` (question -> answer), ``thoughts`` before it, ``pause`` between pieces, ``key``. What
    they see: ``asked``."""

    def __init__(self, key=None):
        self.key, self.pause, self.script, self.thoughts = key, 0.002, {}, ""
        self.asked, self.cancelled = [], 0
        self.busy, self.waiting, self.stats = False, 0, None
        model = torch.nn.Linear(1000, 1000)
        model.device = torch.device("cpu")
        self.engine = SimpleNamespace(
            model=model, runtime=Caches(), settings=SimpleNamespace(link_gbps=25.0), parked_bytes=900_000_000
        )

    def count(self, tokens):
        stats = self.stats = DecodeStats(prompt_tokens=1234, reused_tokens=1000)
        for _ in range(tokens // 4):
            stats.add_pass(6, 3, True, 4)
            stats.draft.add(4, 3)
        stats.decode_s, stats.link_bytes = 1.0, 20_000_000_000
        if self.engine.runtime.device.trace is not None:
            self.engine.runtime.device.record()


def reply(question):
    if found := re.search(r"count to (\d+)", question):
        return " ".join(map(str, range(1, int(found[1]) + 1)))
    return f"You said {len(question)} characters."


def event(choice=None, **more):
    choices = [] if choice is None else [{"index": 0, "finish_reason": None, **choice}]
    return f"data: {json.dumps({'object': 'chat.completion.chunk', 'choices': choices, **more})}\n\n"


async def chunks(backend, body, refused):
    question = body["messages"][-1]["content"]
    asked = question.rpartition("</document>\n\n")[2]
    text = backend.script.get(asked) or reply(asked)
    total = max(16, len(question))
    yield ": awake\n\n"
    for done in range(0, total + 1, max(1, total // 4)):
        progress = {"total": total, "cached": 8, "processed": max(8, done), "time_ms": 40 * done}
        yield event({"delta": {}}, prompt_progress=progress)
        await asyncio.sleep(backend.pause)
    yield event({"delta": {"role": "assistant", "content": ""}})
    for piece in re.findall(r"(?s).{1,5}", backend.thoughts):
        yield event({"delta": {"reasoning_content": piece}})
        await asyncio.sleep(backend.pause)
    for piece in re.findall(r".{1,3}|\n", text) if len(text) < 5000 else re.findall(r"(?s).{1,4000}", text):
        yield event({"delta": {"content": piece}})
        await asyncio.sleep(backend.pause)
    if refused:
        yield f"data: {json.dumps({'error': {'message': 'The caches were given back'}})}\n\n"
        return
    yield event({"delta": {}, "finish_reason": "stop"})
    yield event(usage={"prompt_tokens": 20, "completion_tokens": 9, "prompt_tokens_details": {"cached_tokens": 8}})
    yield "data: [DONE]\n\n"


def make_app(backend):
    app = FastAPI()

    @app.middleware("http")
    async def policy(request, call_next):
        response = await call_next(request)
        response.headers.update(GUARD)
        return response

    def checked(request: Request):
        if backend.key and request.headers.get("Authorization") != f"Bearer {backend.key}":
            raise HTTPException(401, "a key is wanted")

    @app.get("/v1/models", dependencies=[Depends(checked)])
    def models():
        return {"object": "list", "data": [{"id": "fake-model", "object": "model"}]}

    @app.post("/v1/chat/completions", dependencies=[Depends(checked)])
    async def complete(request: Request):
        body = await request.json()
        backend.asked.append(body)
        question = body["messages"][-1]["content"]
        if question == "full":
            error = {"error": {"message": "The queue is full.", "type": "rate_limit", "code": None}}
            return JSONResponse(error, 429, {"Retry-After": "7"})

        async def watched():
            backend.busy, ended = True, False
            try:
                async for chunk in chunks(backend, body, question == "break"):
                    backend.count(40)
                    yield chunk
                ended = True
            finally:
                backend.busy = False
                backend.cancelled += not ended

        return StreamingResponse(watched(), media_type="text/event-stream")

    app.include_router(live_router(backend), dependencies=[Depends(checked)])
    app.include_router(pdf_router(), dependencies=[Depends(checked)])
    app.mount("/", StaticFiles(directory=PAGE, html=True))
    return app


@contextlib.contextmanager
def serve(app, port=0):
    """Yields the address."""
    running = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        while not running.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    finally:
        running.should_exit = running.force_exit = True
        thread.join()


if __name__ == "__main__":
    with serve(make_app(Backend()), 8000) as address:
        print(address)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
