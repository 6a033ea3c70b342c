"""The text of a PDF for the page. A PDF is a stranger's program: it is read in a process of its own, with limits.

app.include_router(pdf_router(), dependencies=[the check of the API key])
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from offload_triforce.server.bodies import read_body
from offload_triforce.server.errors import ApiError

READER = Path(__file__).with_name("pdf_text.py")
# Of a file, as the page has it; and seconds until its reader is ended.
MOST_BYTES = 32_000_000
MOST_SECONDS = 60.0


def pdf_router(
    read_seconds: float = 30.0, most_bytes: int = MOST_BYTES, most_seconds: float = MOST_SECONDS
) -> APIRouter:
    """``POST /page/pdf``: the file as the body; the answer is {"text", "pages"}, or an error in OpenAI's shape.

    ``read_seconds``: for the body to arrive. One is read at a time; others wait.
    """
    router, turn = APIRouter(), asyncio.Semaphore(1)

    async def read(request: Request) -> JSONResponse:
        try:
            body = await _body(request, most_bytes, read_seconds)
            async with turn:
                return JSONResponse(await _read(body, most_seconds))
        except ApiError as error:
            return JSONResponse(error.openai(), status_code=error.status, headers=error.headers)

    router.add_api_route("/page/pdf", read, methods=["POST"], include_in_schema=False)
    return router


async def _body(request: Request, most: int, seconds: float) -> bytes:
    """The whole file, given up as soon as it is too long or too late, whatever its head says."""
    try:
        return await read_body(request, most, seconds)
    except ApiError as error:
        if error.status != 413:
            raise
        message = f"The file is larger than {most / 1e6:g} MB, the most that is read"
        raise ApiError(413, message, headers=error.headers) from None


async def _read(body: bytes, most_seconds: float) -> dict[str, Any]:
    pipe = asyncio.subprocess.PIPE
    # -I: neither the working folder nor the environment says what is imported.
    reader = await asyncio.create_subprocess_exec(
        sys.executable, "-I", str(READER), stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        said, _ = await asyncio.wait_for(reader.communicate(body), most_seconds)
    except asyncio.TimeoutError:
        raise ApiError(422, f"The PDF could not be read within {most_seconds:g} s") from None
    finally:
        if reader.returncode is None:  # too slow, or the client has gone
            reader.kill()
            await reader.wait()
    try:
        found = json.loads(said)
    except ValueError:
        raise ApiError(422, "The PDF could not be read: it needs more memory or time than it is given") from None
    if "error" in found:
        raise ApiError(found["status"], found["error"])
    return found
