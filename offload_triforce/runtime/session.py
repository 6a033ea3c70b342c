"""A session: one text in a runtime's caches. It is begun, by reading it or with what was read before, and continued."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from offload_triforce.model.adapter import attached
from offload_triforce.model.layout import ModelLayout
from offload_triforce.model.prefill import AttentionPart, LayerPart, Progress, RecurrentPart, prefill
from offload_triforce.runtime.runtime import PREFILL_QUERIES, Runtime
from offload_triforce.scheduler.device import on
from offload_triforce.scheduler.store import Leaving
from offload_triforce.speculation.acceptance import AcceptanceRule
from offload_triforce.speculation.draft_selector import Drafter
from offload_triforce.speculation.hierarchy import decode
from offload_triforce.speculation.stats import DecodeStats
from offload_triforce.speculation.text import TokenText
from offload_triforce.speculation.tree import chain


class Session:
    """One text in the caches of a runtime, all but its newest token. A runtime has one at a time: the latest begun.

    Attributes:
        begun: whether the caches hold the beginning of a text; else ``continue_text`` reads it first.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.begun = runtime, False

    def begin(self, tokens: Tensor, progress: Progress | None = None) -> None:
        """Read ``tokens`` (n,) into empty caches. They are ready to continue from when it ends.

        The model must be attached, gradients off. ``progress``: told (steps done, steps in all).
        """
        runtime, caches = self.runtime, self.runtime.caches
        caches.reset()
        if len(tokens):
            chunk = runtime.settings.prefill_chunk
            states = runtime.states
            told = None if caches.hidden is None else partial(self._keep_hidden, len(tokens))
            prefill(runtime.model, runtime.layout, tokens, chunk, PREFILL_QUERIES, self._fill, progress, states, told)
        caches.end_fill(len(tokens))
        self.begun = True
        if runtime.layout.device.type == "cuda":
            # So that its time is not taken for decoding's.
            torch.cuda.current_stream(runtime.layout.device).synchronize()

    def _fill(self, layer: int, part: LayerPart) -> Leaving | None:
        if isinstance(part, RecurrentPart):
            self.runtime.caches.fill_state(layer, *part)
            return None
        return self.runtime.caches.fill(layer, *part)

    def _keep_hidden(self, total: int, part: range, states: Tensor) -> None:
        """``part`` of a text of ``total`` tokens is through all layers: keep what a drafter may want of it."""
        window, norm = self.runtime.caches.hidden, self.runtime.model.get_decoder().norm
        for piece in window.wanted(part, total):
            window.fill(piece.start, norm(states[piece.start - part.start : piece.stop - part.start]))

    def begin_with(self, tokens: int, layers: Iterable[LayerPart]) -> None:
        """The same with ``tokens`` tokens, what each layer makes of which is there: ``layers``, on the device."""
        caches = self.runtime.caches
        caches.reset()
        for index, part in enumerate(layers):
            leaving = self._fill(index, part)
            if leaving:
                leaving.wait()
        caches.end_fill(tokens)
        self.begun = True

    @torch.no_grad()
    def begin_as_read(self, reading: Reading, rest: Sequence[int] = ()) -> None:
        """The same with a text that was read before, and what follows it, which is read in passes."""
        device, settings = self.runtime.layout.device, self.runtime.settings
        self.begin_with(len(reading.tokens), (on_device(part, device) for part in reading.layers))
        target, step = self.runtime.target("never" if settings.gamma == 0 else "each pass"), settings.news
        with on(device), attached(self.runtime.model):
            for start in range(0, len(rest), step):
                nodes = chain(rest[start : start + step])
                target.score(nodes)
                target.commit(range(len(nodes)))

    def continue_text(
        self,
        text: TokenText,
        limit: int,
        drafters: Sequence[Drafter],
        rule: AcceptanceRule,
        stats: DecodeStats,
        stop: Callable[[TokenText], bool],
        ended: Callable[[int], bool],
        progress: Progress | None,
    ) -> Iterator[list[int]]:
        """Decode up to ``limit`` tokens; yields the new ones after each pass. What is not begun is read first.

        Args:
            text: the prompt; the caches hold all of it but its last token, if the session is begun.
            limit: most new tokens. rule: how draft tokens are judged.
            drafters: of level 0; the first that can draft is asked, or the one that pays.
            stats: what is counted. stop: see ``hierarchy.decode``. ended: is there nothing to say after this token?
            progress: told how far the prefill is.
        """
        runtime, started = self.runtime, time.perf_counter()
        crossed, up = runtime.link_bytes, runtime.brought_up
        stats.prompt_tokens = len(text)
        if not self.begun:
            self.begin(text.ids[:-1], progress)
        resumed = time.perf_counter()
        stats.prefill_s = resumed - started
        stats.resident_link_bytes = runtime.brought_up - up
        stats.prefill_link_bytes = runtime.link_bytes - crossed - stats.resident_link_bytes
        crossed = runtime.link_bytes
        target, tree_drafter = runtime.levels(drafters, rule, stats, ended)
        for tokens in decode(target, tree_drafter, rule, text, limit, stats, stop):
            now = time.perf_counter()
            stats.ttft_s = stats.ttft_s or now - started
            stats.decode_s += now - resumed
            stats.link_bytes = runtime.link_bytes - crossed
            stats.full_kv_bytes = runtime.full_kv_bytes(len(text) - 1)  # the newest token has no KV yet
            yield tokens
            resumed = time.perf_counter()  # the reader's own time does not count


@dataclass(frozen=True)
class Reading:
    """What a prefill has computed, to begin any number of sessions with, over caches of any settings.

    Attributes:
        tokens: (n,). layers: what each has made of them.
    """

    tokens: Tensor
    layers: list[LayerPart]

    @property
    def size(self) -> int:
        """Bytes of what is kept in host memory."""
        return sum(part.kv.nbytes for part in self.layers if isinstance(part, AttentionPart))

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        layout: ModelLayout,
        tokens: Sequence[int],
        chunk: int = 1024,
        progress: Progress | None = None,
    ) -> Reading:
        """Read a text; its KV stays in host memory."""
        ids, layers = torch.as_tensor(tokens, dtype=torch.long), []

        def keep(index: int, part: LayerPart) -> None:
            if isinstance(part, AttentionPart):
                part = part._replace(kv=part.kv.to("cpu", copy=True), queries=part.queries.clone())
            layers.append(part)

        with on(layout.device), attached(model), torch.no_grad():
            prefill(model, layout, ids, chunk, PREFILL_QUERIES, keep, progress)
        return cls(ids, layers)


def on_device(part: LayerPart, device: torch.device) -> LayerPart:
    """The part with its largest tensor on a device: the others are there."""
    return part._replace(kv=part.kv.to(device)) if isinstance(part, AttentionPart) else part
