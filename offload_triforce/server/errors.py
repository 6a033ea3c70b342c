"""Errors as OpenAI's clients (and Anthropic's) expect them: a status, one sentence, and a code for programs."""

from __future__ import annotations

import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match, Mount

from offload_triforce.errors import BusyError, MemoryLimitError, TriForceError

SHOWN = 80  # characters of a value that is quoted in an error
MESSAGES = "/v1/messages"  # where errors have Anthropic's shape
_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large"}
# How pydantic names the ways that a field may go: none of the client's words.
_WAYS = re.compile(r"(function|lax|json|constrained)-.*|str|int|float|bool|(list|dict|nullable)\[.*\]")
_KINDS |= {429: "rate_limit_error", 500: "api_error", 503: "overloaded_error"}


class ApiError(Exception):
    """What a client is told instead of an answer.

    Attributes:
        status: of HTTP. message: one sentence. kind: OpenAI's ``type``. param: the parameter at fault. code: for
            programs. headers: further ones of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers = headers or {}

    def openai(self) -> dict[str, Any]:
        """The body in OpenAI's shape."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def anthropic(self) -> dict[str, Any]:
        """The body in Anthropic's shape."""
        kind = _KINDS.get(self.status, "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be answered as it is."""
    return ApiError(400, message, param=param, code=code)


def as_api_error(error: BaseException) -> ApiError:
    """Whatever went wrong, for the client. What nobody foresaw is not described: it may quote what is not its own."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BusyError):
        return ApiError(503, str(error), "server_error", headers={"Retry-After": "1"})
    if isinstance(error, MemoryLimitError):
        return invalid(str(error), code="memory_limit")
    if isinstance(error, TriForceError):
        return invalid(str(error))
    return ApiError(500, "the server made a mistake; its log says more", "server_error")


def refuse_invalid(error: ValidationError) -> ApiError:
    """What pydantic found first, in one sentence. Of a field that may be several things, what came nearest to one."""
    found = error.errors(include_url=False, include_context=False)
    first = max((each for each in found if each["loc"][:1] == found[0]["loc"][:1]), key=lambda each: len(each["loc"]))
    place = ".".join(str(part) for part in first["loc"] if not _WAYS.fullmatch(str(part)))
    message = first["msg"].removeprefix("Value error, ").replace(" after validation", "")
    if first["type"] == "json_invalid":
        return invalid(f"the body is not JSON: {message.removeprefix('Invalid JSON: ')}")
    said = first["type"] in ("missing", "value_error", "too_short")  # all that there is to say
    value = "" if said else f", not {quote(first['input'])}"
    name = place or "the body"
    return invalid(f"{name}: {message[:1].lower()}{message[1:]}{value}", param=place or None)


def quote(value: Any) -> str:
    """A value for a sentence; long ones are cut."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"a number of {value.bit_length():,} bits"
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} with {len(value):,} entries"
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def install(app: FastAPI) -> None:
    """Let all errors of an application have these shapes."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        told = as_api_error(error)
        body = told.anthropic() if request.url.path.startswith(MESSAGES) else told.openai()
        return JSONResponse(body, told.status, told.headers)

    async def http(request: Request, error: HTTPException) -> JSONResponse:
        status, methods = error.status_code, allowed_methods(app, request)
        if status not in (404, 405):
            return await answer(request, ApiError(status, str(error.detail)))
        place = quote(request.url.path)
        if status == 404 and not methods:
            return await answer(request, ApiError(404, f"there is nothing at {place}"))
        methods = methods or ["GET", "HEAD"]  # of the page
        message = f"{request.method} is not possible at {place}; {' and '.join(methods)} would be"
        return await answer(request, ApiError(405, message, headers={"Allow": ", ".join(methods)}))

    async def query(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][1:])
        return await answer(request, invalid(f"{name}: {first['msg']}, not {quote(first['input'])}", param=name))

    app.add_exception_handler(ApiError, answer)
    app.add_exception_handler(RequestValidationError, query)
    app.add_exception_handler(TriForceError, answer)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, answer)


def allowed_methods(app: FastAPI, request: Request) -> list[str]:
    """What a path can be asked by. The page's files, which lie at the root, do not know of the other paths."""
    routes = [route for route in app.router.routes if not isinstance(route, Mount)]
    return [
        method
        for method in ("GET", "HEAD", "POST")
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in routes)
    ]
