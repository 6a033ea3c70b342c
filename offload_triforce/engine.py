"""The one object that a user needs: load a model, generate, stream."""

from __future__ import annotations

import weakref
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from offload_triforce.config import Settings, replace_settings
from offload_triforce.generation.answer import Generation, TextStream
from offload_triforce.generation.async_stream import AsyncTextStream
from offload_triforce.generation.checks import Prompt, check_context, check_length, encode_prompt
from offload_triforce.generation.options import check_call
from offload_triforce.generation.request import Request, interpret
from offload_triforce.generation.turn import Answer, Closing, Turns
from offload_triforce.machine.teams import release_team
from offload_triforce.model.fetch import find_source
from offload_triforce.model.loader import load_model, max_positions, resolve_device, resolve_dtype
from offload_triforce.model.lock import do_and_undo
from offload_triforce.model.packing import check_packing
from offload_triforce.model.prefill import Progress
from offload_triforce.model.to_host import place_embeddings
from offload_triforce.runtime.conversation import Session as Conversation
from offload_triforce.runtime.decoding import Task, decode_answer
from offload_triforce.runtime.drafters import DraftChoice, Drafters, check_named
from offload_triforce.runtime.runtime import Runtime
from offload_triforce.runtime.saving import Saver
from offload_triforce.runtime.self_check import accept
from offload_triforce.runtime.session import Session
from offload_triforce.runtime.texts import Texts
from offload_triforce.speculation.stats import DecodeStats
from offload_triforce.speculation.text import TokenText


class TriForce:
    """A target model with its draft, caches and settings.

    >>> engine = TriForce.load("smollm2")
    >>> for piece in engine.stream("Once upon a time"):
    ...     print(piece, end="")

    It may be used by several threads and tasks. It gives one answer at a time, since it has one set of caches; others
    wait for their turn (``turn.py`` says who does, and who gives way). Engines of one model take turns step by step
    (``model/lock.py``). The model can be used beside them: in other threads it is what it always was
    (``model/attach.py``).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        draft: DraftChoice = "auto",
        draft_tokenizer: PreTrainedTokenizerBase | None = None,
        settings: Settings | None = None,
        **changes: Any,
    ) -> None:
        """Wrap a loaded model. It stays as it is: our attention is attached only in our threads, while they decode.

        With ``embeddings="host"``, its table of input embeddings moves, and it reads the same as before.

        Args:
            model: a transformers decoder, on one device. tokenizer: of both models.
            draft: a small model with the same vocabulary, "ngram" (look-up in the text), "mtp" (the MTP head of the
                checkpoint that the model was loaded from), "self" (the target's own weights over a streaming cache)
                or "none"; "ngram+self", "mtp+ngram" or ("ngram", small model) takes whichever serves better from place
                to place. "auto" is "mtp+ngram" where there is such a head, else "ngram".
            draft_tokenizer: checked against ``tokenizer``.
            settings: how to run; single ones may be given by name, as ``budget=2048``.

        Raises:
            UnsupportedModelError: names what this runtime cannot decode exactly.
            InputError: a setting out of range, or a draft with another tokenizer.
        """
        self.settings = replace_settings(settings or Settings(), changes)
        self.model, self.tokenizer = model, tokenizer
        self.layout = accept(model, self.settings.check)
        place_embeddings(model, self.settings.embeddings)
        self._drafters = Drafters(draft, model, self.layout, tokenizer, draft_tokenizer, self.settings)
        if self.settings.context is not None:
            check_context(self.settings.context, self.layout.max_positions)
        self._turns = Turns()  # of the answers that the caches belong to
        self._texts = Texts(model, self.layout, self.settings, self._drafters, self._turns)
        self._saver = Saver(model, self.layout, tokenizer, self._texts, self.settings.session_dir)
        release_team()  # another thread may decode

    @classmethod
    def load(
        cls,
        model: str,
        draft: str = "auto",
        dtype: str = "auto",
        device: str = "auto",
        quantize: str | None = None,
        settings: Settings | None = None,
        quantize_head: str | None = None,
        **changes: Any,
    ) -> TriForce:
        """Load by name: one that ``offload-triforce models`` lists, a hub id, a folder, or a GGUF file.

        Args:
            model: the target. draft: likewise, or "auto", "ngram", "mtp", "self", "none"; "ngram+" before a model
                takes both.
            dtype: "auto", "float32", "bfloat16" or "float16"; of the weights and of the KV cache.
            device: "auto", "cuda", "cuda:N" or "cpu".
            quantize: "nf4" or "int8" weights (bitsandbytes); the KV cache keeps ``dtype``.
            settings: how to run; single ones may be given by name, lengths also as text: context="128K".
            quantize_head: "int8", of the output embedding. The model that is loaded so is the target of all levels.

        Raises:
            InputError, UnsupportedModelError: one sentence each.
        """
        settings = replace_settings(settings or Settings(), changes)  # refused before the weights are read
        check_packing(quantize, quantize_head)
        where = resolve_device(device)
        kind = resolve_dtype(dtype, where)
        small = check_named(draft, model)
        if settings.context is not None:
            model = find_source(model)  # once: what is kept here is hashed
            check_context(settings.context, max_positions(model))
        host_embeddings = settings.embeddings != "device" and where.type == "cuda"
        target, tokenizer = load_model(model, kind, where, quantize, quantize_head, host_embeddings)
        if small is None:
            return cls(target, tokenizer, draft, settings=settings)
        loaded, draft_tokenizer = load_model(small, kind, where)
        return cls(target, tokenizer, ("ngram", loaded) if draft != small else loaded, draft_tokenizer, settings)

    def generate(
        self,
        prompt: Prompt,
        generation_config: GenerationConfig | None = None,
        *,
        seed: int | None = None,
        streamer: BaseStreamer | None = None,
        progress: Progress | None = None,
        pinning: Progress | None = None,
        wait: bool = True,
        session: Conversation | None = None,
        **options: Any,
    ) -> Generation:
        """Continue a text; see ``stream`` for the arguments. Returns the answer with its statistics."""
        told = {"progress": progress, "pinning": pinning, "wait": wait, "session": session}
        with self.stream(prompt, generation_config, seed=seed, streamer=streamer, **told, **options) as stream:
            for _ in stream:
                pass
            return stream.result

    def stream(
        self,
        prompt: Prompt,
        generation_config: GenerationConfig | None = None,
        *,
        seed: int | None = None,
        streamer: BaseStreamer | None = None,
        progress: Progress | None = None,
        pinning: Progress | None = None,
        wait: bool = True,
        session: Conversation | None = None,
        **options: Any,
    ) -> TextStream:
        """Continue a text, piece by piece.

        Args:
            prompt: text, token ids, a tensor (n,) or (1, n) of them, or the messages of a chat, each with a "role" and
                a "content", which the model's chat template puts together.
            generation_config: transformers' own. Its keywords may be given directly too: max_new_tokens,
                temperature (0 is greedy), top_k, top_p, min_p, repetition_penalty, stop_strings (or stop),
                logits_processor, stopping_criteria and so on; the model's defaults fill the rest.
            seed: of the draws; None takes one from torch's global generator.
            streamer: a transformers streamer. It gets the prompt, then every token.
            progress: called with (done, total) during the prefill.
            pinning: called with (done, total) bytes while host memory is pinned in the background (CUDA).
            wait: until the answer of another thread is over, if there is one. False: a ``BusyError`` instead.
            session: the text that goes on; by default any that was read before and that the prompt goes on with.

        Returns:
            An iterator of text. Its ``result`` is what has been generated so far.

        Raises:
            InputError, MemoryLimitError, BusyError: before the work starts.
        """
        how = {"seed": seed, "streamer": streamer, "progress": progress, "pinning": pinning, "wait": wait}
        how["session"] = session
        return self._stream(Answer(), prompt, generation_config, options, how)

    def astream(
        self,
        prompt: Prompt,
        generation_config: GenerationConfig | None = None,
        *,
        seed: int | None = None,
        streamer: BaseStreamer | None = None,
        progress: Progress | None = None,
        pinning: Progress | None = None,
        wait: bool = True,
        session: Conversation | None = None,
        **options: Any,
    ) -> AsyncTextStream:
        """The same for ``async for``, decoded on a thread of its own; see ``stream`` for the arguments.

        Callbacks are called on that thread. What ``stream`` raises comes with the first piece.
        """
        how = {"seed": seed, "streamer": streamer, "progress": progress, "pinning": pinning, "wait": wait}
        how["session"] = session
        return AsyncTextStream(lambda answer: self._stream(answer, prompt, generation_config, options, how))

    async def agenerate(
        self, prompt: Prompt, generation_config: GenerationConfig | None = None, **options: Any
    ) -> Generation:
        """Continue a text without blocking the event loop; see ``astream`` for the arguments."""
        async with self.astream(prompt, generation_config, **options) as stream:
            async for _ in stream:
                pass
        return stream.result

    def run(
        self,
        request: Request,
        seed: int | None = None,
        streamer: BaseStreamer | None = None,
        progress: Progress | None = None,
        pinning: Progress | None = None,
        wait: bool = True,
        session: Conversation | None = None,
        answer: Answer | None = None,
    ) -> TextStream:
        """Decode a request that has been interpreted already. ``answer``: by which others may cancel it, or wait."""
        return self._run(answer or Answer(), request, seed, streamer, progress, pinning, wait, session)

    def resume(self, session: Session, prompt: Prompt, seed: int, **options: Any) -> TextStream:
        """Continue a text that a session has begun: its caches hold all of ``prompt`` but the last token.

        ``options``: as for ``stream``.
        """
        request = interpret(
            self.model, encode_prompt(prompt, self.model, self.tokenizer), None, self.tokenizer, options
        )
        answer = Answer()
        try:
            self._turns.take(answer, wait=True)
            return self._begin(answer, session, request, seed, None)
        except BaseException:
            self._turns.release(answer)
            raise

    @property
    def runtime(self) -> Runtime | None:
        """The caches of the latest request, and the settings that were chosen for them; None before the first."""
        return self._texts.runtime

    @property
    def parked_bytes(self) -> int:
        """Bytes of host memory that texts take beside caches, and what was read of one in part. Any thread may ask."""
        return self._texts.parked_bytes

    def session(self) -> Conversation:
        """A text of its own, kept from question to question whatever else is asked of this engine."""
        return Conversation(self, self._texts, self._saver, self._texts.pool.add(owned=True))

    def load_session(self, path: str | Path, progress: Progress | None = None) -> Conversation:
        """Go on with a session that was saved, see ``Saver.load``. It is read when it is first asked something."""
        return Conversation(self, self._texts, self._saver, self._saver.load(Path(path), progress))

    def close(self) -> None:
        """Give the caches back. An answer that is still being read is given up, at the end of its present step."""
        closing = Closing()

        def work() -> None:
            self._turns.close(closing)
            self._texts.close()

        do_and_undo(work, lambda: self._turns.release(closing))

    def __enter__(self) -> TriForce:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _stream(
        self,
        answer: Answer,
        prompt: Prompt,
        generation_config: GenerationConfig | None,
        options: dict[str, Any],
        how: dict[str, Any],
    ) -> TextStream:
        ids = encode_prompt(prompt, self.model, self.tokenizer)
        return self._run(answer, interpret(self.model, ids, generation_config, self.tokenizer, options), **how)

    def _run(
        self,
        answer: Answer,
        request: Request,
        seed: int | None,
        streamer: BaseStreamer | None,
        progress: Progress | None,
        pinning: Progress | None,
        wait: bool,
        session: Conversation | None,
    ) -> TextStream:
        check_call(seed, streamer)
        check_length(self.layout, self.settings, len(request.prompt), request.max_new_tokens)
        try:
            self._turns.take(answer, wait)
            cached = self._texts.ensure(len(request.prompt) + request.max_new_tokens, pinning)
            seed = int(torch.randint(2**62, (1,), device="cpu")) if seed is None else seed
            seat = partial(self._texts.seat, request.prompt, None if session is None else session.text)
            return self._begin(answer, cached, request, seed, streamer, progress=progress, wait=wait, seat=seat)
        except BaseException:
            self._turns.release(answer)
            raise

    def _begin(
        self, answer: Answer, session: Session, request: Request, seed: int, streamer: BaseStreamer | None, **how: Any
    ) -> TextStream:
        """An answer whose turn it is. It keeps the turn until it is over, or until nobody refers to it any more."""
        with torch.inference_mode(False):
            text = TokenText(request.prompt, len(request.prompt) + request.max_new_tokens + 1)
        task = Task(self.model, self._drafters, session, request, seed, text, DecodeStats(), **how)
        tokens = decode_answer(task, self._turns, answer, self._texts.give_back)
        release = partial(self._turns.release, answer)
        stream = TextStream(tokens, request.prompt, self.tokenizer, task.stats, streamer, answer.cancel, release)
        weakref.finalize(stream, release).atexit = False
        self._turns.pause(answer)
        return stream
