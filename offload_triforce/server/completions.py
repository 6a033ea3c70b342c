"""OpenAI's older way to ask: /v1/completions, a text that is continued."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from offload_triforce.server.answering import Answering, Question
from offload_triforce.server.asking import answer_to
from offload_triforce.server.bodies import Texts
from offload_triforce.server.chat import StreamOptions
from offload_triforce.server.errors import invalid, quote
from offload_triforce.server.logprobs import completion_logprobs
from offload_triforce.server.prompting import ask, text_prompt
from offload_triforce.server.reporter import Ended, Progress, Said
from offload_triforce.server.sampling import HARMLESS, Sampling
from offload_triforce.server.service import Service
from offload_triforce.server.shapes import new_id, progress, usage
from offload_triforce.server.streaming import DONE, EventStream, event, unless_gone

DEFAULT_TOKENS = 16  # OpenAI's, for this path alone
MOST_LOGPROBS = 5


class CompletionRequest(Sampling):
    """A request for what follows a text."""

    prompt: str | Annotated[list[int], Field(fail_fast=True)] | Texts
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int | None, Field(ge=0, le=MOST_LOGPROBS)] = None
    best_of: int | None = None
    return_progress: bool | None = None

    def text(self) -> str | list[int]:
        """The prompt: one text, or one list of ids.

        Raises:
            ApiError: several, or a parameter that cannot be done.
        """
        self.check_unknown(HARMLESS)
        self.check_one()
        if self.best_of not in (None, 1):
            raise invalid(f"best_of must be 1, not {quote(self.best_of)}", "best_of")
        if isinstance(self.prompt, list) and any(isinstance(part, str) for part in self.prompt):
            if len(self.prompt) != 1:
                raise invalid(f"prompt holds {len(self.prompt):,} texts; ask for one at a time", "prompt")
            return str(self.prompt[0])
        return self.prompt  # type: ignore[return-value]


class Completion:
    """One answer in the shape of OpenAI's completions."""

    def __init__(self, service: Service, asked: CompletionRequest, model: str, answering: Answering) -> None:
        self._service, self._asked, self._answering = service, asked, answering
        self._about = {"id": new_id("cmpl"), "object": "text_completion", "created": int(time.time()), "model": model}
        self._said = 0  # characters

    async def whole(self) -> dict[str, Any]:
        """The answer, when it is complete."""
        text, told = "", []
        async for happened in self._answering.events():
            if isinstance(happened, Said):
                text, told = text + happened.text, told + happened.logprobs
            elif isinstance(happened, Ended):
                choices = [self._choice(text, told, happened.reason)]
                return {**self._about, "choices": choices, "usage": usage(happened.stats)}
        raise AssertionError("an answer ends")

    async def stream(self) -> AsyncIterator[bytes]:
        """The answer as it comes."""
        counted = bool(self._asked.stream_options and self._asked.stream_options.include_usage)
        more = {"usage": None} if counted else {}
        async for happened in self._answering.events():
            if isinstance(happened, Progress) and self._asked.return_progress:
                told = {"prompt_progress": progress(happened), **more}
                yield event({**self._about, "choices": [self._choice("", [], None)], **told})
            elif isinstance(happened, Said):
                yield event({**self._about, "choices": [self._choice(happened.text, happened.logprobs, None)], **more})
            elif isinstance(happened, Ended):
                yield event({**self._about, "choices": [self._choice("", [], happened.reason)], **more})
                if counted:
                    yield event({**self._about, "choices": [], "usage": usage(happened.stats)})
        yield DONE

    def _choice(self, text: str, told: list[Any], reason: str | None) -> dict[str, Any]:
        logprobs = None
        if self._asked.logprobs is not None:
            logprobs = completion_logprobs(self._service.tokenizer, told, self._said)
        self._said += len(text)
        return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason}


def completion_routes(service: Service) -> APIRouter:
    """The paths."""
    router = APIRouter()

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        def question(asked: CompletionRequest) -> tuple[None, Question]:
            ids = text_prompt(service, asked.text())
            limit = asked.max_tokens or DEFAULT_TOKENS
            return None, ask(service, ids, asked, limit, top_logprobs=asked.logprobs)

        asked, model, _, answering = await answer_to(service, request, CompletionRequest, question)
        completion = Completion(service, asked, model, answering)
        if asked.stream:
            return EventStream(completion.stream(), answering.cancel, service.options.ping_seconds)
        return JSONResponse(await unless_gone(request, completion.whole()))

    return router
