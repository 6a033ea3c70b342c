"""One answer of an engine, step by step: when its turn is, with the models locked, until it is over or cancelled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel

from offload_triforce.errors import MemoryLimitError
from offload_triforce.generation.request import Request
from offload_triforce.generation.turn import Answer, CancelledAnswer, Turns
from offload_triforce.machine.teams import release_team
from offload_triforce.model.adapter import Attachment
from offload_triforce.model.layout import ModelLayout
from offload_triforce.model.prefill import Progress
from offload_triforce.runtime.drafters import Drafters
from offload_triforce.runtime.session import Session
from offload_triforce.scheduler.device import on
from offload_triforce.speculation.acceptance import AcceptanceRule, Coupled, Resampled
from offload_triforce.speculation.noise import Noise
from offload_triforce.speculation.sampling import RandomChoices, Sampler
from offload_triforce.speculation.stats import DecodeStats
from offload_triforce.speculation.text import TokenText
from offload_triforce.speculation.watched import Watched


@dataclass
class Task:
    """What is to be decoded, and what with.

    Attributes:
        model, drafters: of one engine. session: for the text, in the engine's caches.
        request: what is asked for. seed: of the draws.
        text: the prompt, and then the answer too. stats: what is counted.
        progress: told how far the prefill is.
        seat: called first: brings what is held of the prompt into the caches.
        wait: for the models, where another thread is at work on them as the answer begins.
    """

    model: PreTrainedModel
    drafters: Drafters
    session: Session
    request: Request
    seed: int
    text: TokenText
    stats: DecodeStats
    progress: Progress | None = None
    seat: Callable[[], None] | None = None
    wait: bool = True

    def steps(self, answer: Answer) -> Iterator[list[int]]:
        """Prefill and passes; yields the new tokens after each pass."""
        if self.seat is not None:
            self.seat()
        request, runtime = self.request, self.session.runtime
        readable = self.model.get_input_embeddings().num_embeddings
        rule = make_rule(runtime.settings.rule, request, self.seed, runtime.layout, readable)
        rule = rule if request.watch is None else Watched(rule, request.watch)
        self.stats.target_only = request.target_only(runtime.settings)

        def progress(done: int, total: int) -> None:
            answer.check()
            if self.progress is not None:
                self.progress(done, total)

        def stop(text: TokenText) -> bool:
            self.stats.ending = request.ending(text.ids)
            return self.stats.ending is not None

        yield from self.session.continue_text(
            self.text,
            request.max_new_tokens,
            self.drafters.make(rule, runtime.caches.hidden),
            rule,
            self.stats,
            stop=stop,
            ended=request.eos.__contains__,
            progress=progress,
        )


def make_rule(kind: str, request: Request, seed: int, layout: ModelLayout, readable: int) -> AcceptanceRule:
    """How draft tokens are judged: by the ``rule`` setting at a temperature, by comparison where nothing is drawn.

    ``readable``: token ids that the target can read.
    """
    sampler = Sampler(request.processors, request.do_sample, layout.vocabulary, readable)
    if not request.do_sample:
        return Coupled(sampler, None)
    if kind == "resampled":
        return Resampled(sampler, RandomChoices(seed, layout.device))
    return Coupled(sampler, Noise(seed, len(request.prompt), sampler.vocabulary, layout.device))


def decode_answer(task: Task, turns: Turns, answer: Answer, give_back: Callable[[], None]) -> Iterator[list[int]]:
    """Decode; yields the new tokens after each pass, and ends early if the answer is cancelled.

    Between two steps this thread holds no model, and none of torch's modes: they belong to threads, and the next step
    may come from another one. ``answer`` has its turn, and lets go of it at the end. ``give_back``: of the caches.

    Raises:
        InputError: given up for another answer. BusyError: the models are in use, and there is to be no waiting.
        MemoryLimitError: memory ran out; the caches have been given back.
    """
    try:
        try:
            yield from _steps(task, turns, answer, give_back)
        except CancelledAnswer:
            task.stats.interrupted = True
        finally:
            turns.release(answer)
    finally:
        turns.release(answer)  # should an interruption have kept the first from ending
        release_team()


def _steps(task: Task, turns: Turns, answer: Answer, give_back: Callable[[], None]) -> Iterator[list[int]]:
    turns.resume(answer)  # before the draft's cache is touched
    attachment, wait = Attachment(task.model, task.drafters.module), task.wait
    with contextlib.closing(task.steps(answer)) as steps:
        while True:
            work = partial(_next, steps, task.session.runtime.layout.device, give_back)
            tokens = attachment.call(work, wait, lambda: answer.cancelled)
            if tokens is None:
                answer.check()
                return
            turns.pause(answer)
            yield tokens
            answer.check()
            turns.resume(answer)
            wait = True  # having begun, it goes on


def _next(steps: Iterator[list[int]], device: torch.device, give_back: Callable[[], None]) -> list[int] | None:
    """The next tokens; None at the end. Where memory runs out, the caches are given back: what comes may fit.

    Raises:
        MemoryLimitError: the device is full, or host memory cannot be pinned.
    """
    try:
        with on(device), torch.inference_mode(False), torch.no_grad():
            return next(steps, None)
    except torch.OutOfMemoryError as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        reason += "; take a shorter context, a smaller budget or a smaller resident share"
    except MemoryLimitError as error:
        reason = str(error)
    give_back()  # outside of the handlers, where the error would keep alive what it saw
    raise MemoryLimitError(f"memory ran out while decoding: {reason}")
