"""From a request's body to an answer that has its place in the line: the same for all ways to ask."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from fastapi import Request

from offload_triforce.server.answering import Answering, Question
from offload_triforce.server.bodies import parse, read_body
from offload_triforce.server.sampling import Sampling
from offload_triforce.server.service import Service

Asked = TypeVar("Asked", bound=Sampling)
More = TypeVar("More")


async def answer_to(
    service: Service, request: Request, kind: type[Asked], question: Callable[[Asked], tuple[More, Question]]
) -> tuple[Asked, str, More, Answering]:
    """Read a request, and put what it asks into the line.

    ``question``: what the engine is to be asked. It takes its time with long texts, so it is called on a thread.

    Returns:
        The request, the model's name, what ``question`` made beside the question, and the answer, which is under way.

    Raises:
        ApiError, TriForceError: what is wrong with it, or that too many wait.
    """
    service.line.check()  # before a body is read for nothing
    body = await read_body(request, service.options.body_bytes, service.options.read_seconds)
    asked = await asyncio.to_thread(parse, kind, body)
    model = service.check_model(asked.model)
    place = service.line.join()
    try:
        more, what = await asyncio.to_thread(question, asked)
        return asked, model, more, Answering(service, what, place)
    except BaseException:
        place.leave()
        raise
