"""The one object that a user needs: load a model, generate, stream."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from offload_triforce.answer import Generation, TextStream
from offload_triforce.checks import check_context, check_length
from offload_triforce.config import Settings, replace_settings
from offload_triforce.drafts import BOTH, DraftChoice, Drafts
from offload_triforce.errors import InputError, MemoryLimitError
from offload_triforce.model.adapter import attached
from offload_triforce.model.layout import probe
from offload_triforce.model.loader import load_model, max_positions, resolve_device, resolve_dtype
from offload_triforce.model.prefill import Progress
from offload_triforce.planner.choose import choose_for_loaded
from offload_triforce.request import Request, interpret
from offload_triforce.runtime import Runtime, on
from offload_triforce.speculation.rules import Coupling, Noise, Resampling, Rule
from offload_triforce.speculation.sampling import RandomChoices, Sampler
from offload_triforce.speculation.text import TokenText
from offload_triforce.stats import DecodeStats

Prompt = str | Sequence[int] | Tensor


class TriForce:
    """A target model with its draft, caches and settings.

    >>> engine = TriForce.load("SmolLM2-135M-Instruct.Q4_1.gguf")
    >>> for piece in engine.stream("Once upon a time"):
    ...     print(piece, end="")
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        draft: DraftChoice = "ngram",
        draft_tokenizer: PreTrainedTokenizerBase | None = None,
        settings: Settings | None = None,
        **changes: Any,
    ) -> None:
        """Wrap a loaded model. It stays as it is: our attention is attached only while it decodes.

        Args:
            model: a transformers decoder, on one device. tokenizer: of both models.
            draft: a small model with the same vocabulary, "ngram" (look-up in the text), "self" (the target's
                own weights over a streaming cache) or "none"; "ngram+self" or ("ngram", small model) takes whichever
                serves better from guess to guess.
            draft_tokenizer: checked against ``tokenizer``.
            settings: how to run; single ones may be given by name, as ``budget=2048``.

        Raises:
            UnsupportedModelError: names what this runtime cannot decode exactly.
            InputError: a setting out of range, or a draft with another tokenizer.
        """
        self.settings = replace_settings(settings or Settings(), changes)
        self.model, self.tokenizer = model, tokenizer
        self.layout = probe(model)
        self._drafts = Drafts(draft, model, self.layout, tokenizer, draft_tokenizer, self.settings)
        if self.settings.context is not None:
            check_context(self.settings.context, self.layout.max_positions)
        self._runtime: Runtime | None = None
        self._ticket: object = None  # of the answer that the caches belong to

    @classmethod
    def load(
        cls,
        model: str,
        draft: str = "ngram",
        dtype: str = "auto",
        device: str = "auto",
        quantize: str | None = None,
        settings: Settings | None = None,
        **changes: Any,
    ) -> TriForce:
        """Load by name: hub id, folder, or GGUF file.

        Args:
            model: the target. draft: likewise, or "ngram", "self", "none"; "ngram+" before a model takes both.
            dtype: "auto", "float32", "bfloat16" or "float16"; of the weights and of the KV cache.
            device: "auto", "cuda", "cuda:N" or "cpu".
            quantize: "nf4" or "int8" weights (bitsandbytes); the KV cache keeps ``dtype``.
            settings: how to run; single ones may be given by name.

        Raises:
            InputError, UnsupportedModelError: one sentence each.
        """
        settings = replace_settings(settings or Settings(), changes)  # refused before the weights are read
        where = resolve_device(device)
        kind = resolve_dtype(dtype, where)
        if settings.context is not None:
            check_context(settings.context, max_positions(model))
        target, tokenizer = load_model(model, kind, where, quantize)
        if draft in ("ngram", "self", "none", f"{BOTH}self"):
            return cls(target, tokenizer, draft, settings=settings)
        small, draft_tokenizer = load_model(draft.removeprefix(BOTH), kind, where)
        return cls(target, tokenizer, ("ngram", small) if draft.startswith(BOTH) else small, draft_tokenizer, settings)

    def generate(
        self,
        prompt: Prompt,
        generation_config: GenerationConfig | None = None,
        *,
        seed: int | None = None,
        streamer: BaseStreamer | None = None,
        progress: Progress | None = None,
        pinning: Progress | None = None,
        **options: Any,
    ) -> Generation:
        """Continue a text; see ``stream`` for the arguments. Returns the answer with its statistics."""
        told = {"progress": progress, "pinning": pinning}
        stream = self.stream(prompt, generation_config, seed=seed, streamer=streamer, **told, **options)
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
        **options: Any,
    ) -> TextStream:
        """Continue a text, piece by piece.

        Args:
            prompt: text, token ids, or a tensor (n,) or (1, n) of them.
            generation_config: transformers' own. Its keywords may be given directly too: max_new_tokens,
                temperature (0 is greedy), top_k, top_p, min_p, repetition_penalty, stop_strings,
                logits_processor, stopping_criteria and so on; the model's defaults fill the rest.
            seed: of the draws; None takes one from torch's global generator.
            streamer: a transformers streamer. It gets the prompt, then every token.
            progress: called with (done, total) during the prefill.
            pinning: called with (done, total) bytes while host memory is pinned in the background (CUDA).

        Returns:
            An iterator of text. Its ``result`` is what has been generated so far.

        Raises:
            InputError, MemoryLimitError: before the work starts.
        """
        request = interpret(self.model, self._encode(prompt), generation_config, self.tokenizer, options)
        return self.run(request, seed, streamer, progress, pinning)

    def run(
        self,
        request: Request,
        seed: int | None = None,
        streamer: BaseStreamer | None = None,
        progress: Progress | None = None,
        pinning: Progress | None = None,
    ) -> TextStream:
        """Decode a request that has been interpreted already."""
        needed = len(request.prompt) + request.max_new_tokens
        check_length(self.layout, self.settings, len(request.prompt), request.max_new_tokens)
        runtime = self._ensure_runtime(needed, pinning)
        ticket = self._ticket = object()
        seed = int(torch.randint(2**62, (1,), device="cpu")) if seed is None else seed
        with torch.inference_mode(False):
            text, stats = TokenText(request.prompt, needed + 1), DecodeStats()
        tokens = self._decode(runtime, ticket, request, seed, text, stats, progress)
        return TextStream(tokens, request.prompt, self.tokenizer, stats, streamer)

    def resume(self, runtime: Runtime, prompt: Prompt, seed: int, **options: Any) -> TextStream:
        """Continue a text that a runtime's caches hold already, all but its last token. For measurements.

        ``options``: as for ``stream``.
        """
        request = interpret(self.model, self._encode(prompt), None, self.tokenizer, options)
        text, stats = TokenText(request.prompt, len(request.prompt) + request.max_new_tokens + 1), DecodeStats()
        ticket = self._ticket = object()
        tokens = self._decode(runtime, ticket, request, seed, text, stats, None, filled=True)
        return TextStream(tokens, request.prompt, self.tokenizer, stats, None)

    def close(self) -> None:
        """Give the caches back."""
        self._drafts.close()
        if self._runtime is not None:
            self._runtime.close()
            self._runtime = self._ticket = None
            if self.layout.device.type == "cuda":
                torch.cuda.empty_cache()  # so that what was freed counts as free

    def __enter__(self) -> TriForce:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _encode(self, prompt: Prompt) -> Tensor:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InputError("a text prompt needs a tokenizer; pass token ids, or load one with the model")
            if not prompt.strip():
                raise InputError("the prompt is empty; give at least one word")
            prompt = self.tokenizer(prompt, return_tensors="pt").input_ids
        try:
            ids = torch.as_tensor(prompt, dtype=torch.long, device="cpu")
        except (ValueError, TypeError) as error:
            raise InputError(f"the prompt is neither text nor one list of token ids ({error})") from error
        vocabulary = self.model.get_input_embeddings().num_embeddings
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise InputError(f"the prompt holds token ids outside of the vocabulary of {vocabulary}")
        return ids

    def _ensure_runtime(self, needed: int, pinning: Progress | None = None) -> Runtime:
        if self._runtime is not None and self._runtime.context < needed:
            self.close()
        if self._runtime is None:
            context = self.settings.context or needed
            settings = choose_for_loaded(self.model, self.layout, self.settings, context, self._drafts.bytes_to_come)
            with torch.inference_mode(False):  # the lanes' threads could not write to tensors made in that mode
                self._runtime = Runtime(self.model, self.layout, settings, context, pinning)
        return self._runtime

    def _make_rule(self, kind: str, request: Request, seed: int) -> Rule:
        sampler = Sampler(request.processors, request.do_sample, self.layout.vocabulary)
        device = self.layout.device
        if not request.do_sample:
            return Coupling(sampler, None)
        if kind == "resampled":
            return Resampling(sampler, RandomChoices(seed, device))
        return Coupling(sampler, Noise(seed, len(request.prompt), sampler.vocabulary, device))

    def _check_ticket(self, ticket: object) -> None:
        if self._ticket is not ticket:
            raise InputError("this answer was given up: its engine has been closed or asked for another since")

    def _decode(
        self,
        runtime: Runtime,
        ticket: object,
        request: Request,
        seed: int,
        text: TokenText,
        stats: DecodeStats,
        progress: Progress | None,
        filled: bool = False,
    ) -> Iterator[list[int]]:
        self._check_ticket(ticket)  # before the draft's cache is touched
        rule = self._make_rule(runtime.settings.rule, request, seed)
        steps = runtime.decode(
            text,
            request.max_new_tokens,
            self._drafts.make(rule),
            rule,
            stats,
            stop=lambda text, start: request.cut(text.ids, start),
            ended=request.eos.__contains__,
            progress=progress,
            filled=filled,
        )
        with contextlib.closing(steps):
            while True:
                self._check_ticket(ticket)
                with (
                    on(self.layout.device),
                    attached(self.model, self._drafts.model),
                    torch.inference_mode(False),
                    torch.no_grad(),
                ):
                    tokens = self._next(steps)
                if tokens is None:
                    return
                yield tokens

    def _next(self, steps: Iterator[list[int]]) -> list[int] | None:
        """The next tokens; None at the end. Where memory runs out, the caches are given back: what comes may fit.

        Raises:
            MemoryLimitError: the device is full, or host memory cannot be pinned.
        """
        try:
            return next(steps, None)
        except torch.OutOfMemoryError as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            reason += "; take a shorter context, a smaller budget or a smaller resident share"
        except MemoryLimitError as error:
            reason = str(error)
        self.close()  # outside of the handlers, where the error would keep alive what it saw
        raise MemoryLimitError(f"memory ran out while decoding: {reason}")
