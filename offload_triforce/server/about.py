"""What the server says of itself: models, health, metrics; and the model's tokens."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import Field

from offload_triforce._version import __version__
from offload_triforce.generation.detokenize import decode_text
from offload_triforce.server.bodies import Body, parse, read_body
from offload_triforce.server.errors import invalid
from offload_triforce.server.prompting import text_prompt
from offload_triforce.server.service import Service

Id = Annotated[int, Field(ge=0, lt=2**31)]
READ = ["GET", "HEAD"]


class TextBody(Body):
    """A text to be taken apart; either name will do."""

    content: str | None = None
    prompt: str | None = None


class TokenBody(Body):
    """Tokens to be spelled."""

    tokens: Annotated[list[Id], Field(fail_fast=True)]


def health_route(service: Service) -> APIRouter:
    """The one path that needs no key: it says nothing but that the server lives, and whether it is busy."""
    router = APIRouter()

    @router.api_route("/health", methods=READ)  # what watches servers often asks for the head alone
    async def health() -> dict[str, Any]:
        line = service.line
        return {"status": "ok", "busy": line.busy, "waiting": line.waiting, "version": __version__}

    return router


def about_routes(service: Service) -> APIRouter:
    """The other paths."""
    router = APIRouter()

    def model(name: str) -> dict[str, Any]:
        engine = service.engine
        length = engine.settings.context or engine.layout.max_positions
        about = {"id": name, "object": "model", "created": service.started, "owned_by": "offload-triforce"}
        return {**about, "max_model_len": length}

    @router.api_route("/v1/models", methods=READ)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model(name) for name in service.options.names]}

    @router.api_route("/v1/models/{name:path}", methods=READ)
    async def one_model(name: str) -> dict[str, Any]:
        return model(service.check_model(name))

    @router.api_route("/metrics", methods=READ)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @router.post("/tokenize")
    async def tokenize(request: Request) -> dict[str, Any]:
        return await asyncio.to_thread(_tokenize, service, await body_of(service, request))

    @router.post("/detokenize")
    async def detokenize(request: Request) -> dict[str, Any]:
        return await asyncio.to_thread(_detokenize, service, await body_of(service, request))

    return router


async def body_of(service: Service, request: Request) -> bytes:
    """A request's body, within the server's limits."""
    return await read_body(request, service.options.body_bytes, service.options.read_seconds)


def _tokenize(service: Service, body: bytes) -> dict[str, Any]:
    asked = parse(TextBody, body)
    text = asked.content if asked.content is not None else asked.prompt
    if text is None:
        raise invalid("content is missing: the text that is to be taken apart", "content")
    ids = text_prompt(service, text) if text.strip() else []
    return {"tokens": ids, "count": len(ids), "max_model_len": service.engine.layout.max_positions}


def _detokenize(service: Service, body: bytes) -> dict[str, Any]:
    asked, most = parse(TokenBody, body), service.engine.layout.vocabulary
    if asked.tokens and max(asked.tokens) >= most:
        raise invalid(f"tokens holds {max(asked.tokens):,}, and the model has 0 to {most - 1:,}", "tokens")
    text = decode_text(service.tokenizer, asked.tokens)
    return {"content": text, "prompt": text}
