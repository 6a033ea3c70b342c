"""Bodies of requests: read within limits of size and time, and checked against what they may hold."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect

from offload_triforce.server.errors import ApiError, invalid, quote, refuse_invalid

# Parameters of other servers that are on where a request does not name them: switched off, they would change something.
ON_BY_DEFAULT = frozenset(
    {"skip_special_tokens", "add_generation_prompt", "spaces_between_special_tokens", "add_special_tokens"}
)
# Lists are given up at their first mistake: a few megabytes of wrong entries would become gigabytes of complaints.
Texts = Annotated[list[str], Field(fail_fast=True)]
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]


class Body(BaseModel):
    """What a request holds. Parameters that are not among the fields end up in ``unknown``."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())

    def unknown(self) -> dict[str, Any]:
        """Parameters that no field stands for."""
        return dict(self.__pydantic_extra__ or {})

    def check_unknown(self, harmless: frozenset[str]) -> None:
        """Refuse parameters that might change the answer.

        ``harmless``: parameters of others that change nothing here, whatever they are set to.

        Raises:
            ApiError: names the first.
        """
        for name, value in self.unknown().items():
            off = value is False and name not in ON_BY_DEFAULT
            empty = value is None or off or value == [] or value == {} or value == ""
            if name not in harmless and not empty:
                shown = quote(name)
                raise invalid(f"{shown} is not supported, and might change the answer; leave it out", param=name[:80])


Kind = TypeVar("Kind", bound=Body)


async def read_body(request: Request, most: int, seconds: float) -> bytes:
    """All of a body.

    Raises:
        ApiError: it has more than ``most`` bytes, takes longer than ``seconds``, or is compressed.
    """
    coding = request.headers.get("content-encoding", "identity")
    if coding.lower() not in ("", "identity"):
        message = f"a body with Content-Encoding {quote(coding)} is not read here; send it as it is"
        raise ApiError(415, message, code="unsupported_encoding", headers={"Connection": "close"})
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and len(declared) < 20 and int(declared) > most:
        raise _too_large(int(declared), most)
    parts: list[bytes] = []
    try:
        await asyncio.wait_for(_collect(request, parts, most), seconds)
    except asyncio.TimeoutError:
        message = f"the body did not arrive within {seconds:g} s; {sum(map(len, parts)):,} bytes of it did"
        raise ApiError(408, message, headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise ApiError(499, "the client went away") from None
    return b"".join(parts)


async def _collect(request: Request, parts: list[bytes], most: int) -> None:
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise _too_large(size, most)
        parts.append(part)


def _too_large(size: int, most: int) -> ApiError:
    message = f"the body has at least {size:,} bytes, {size - most:,} more than the {most:,} that are allowed"
    return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})


def parse(kind: type[Kind], body: bytes) -> Kind:
    """A body as what it should be.

    Raises:
        ApiError: it is not JSON, or holds something else.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise refuse_invalid(error) from None
    except (ValueError, RecursionError) as error:
        raise invalid(f"the body is not JSON that can be read: {error}") from None
