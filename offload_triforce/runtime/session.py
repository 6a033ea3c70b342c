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
from offload_triforce.planner.sizes import CHECKPOINT_BYTES, group_tokens
from offload_triforce.runtime.held import Checkpoint, KVShape, LiveText, TextSource, thin
from offload_triforce.runtime.prefix import Start, Told, common_prefix, find_start
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
        checkpoints: of what cannot be cut, ascending.
        long: see ``TextSource``.
        fork: after so many tokens a text is marked as it is read, beside where that is done anyway; 0: nowhere.
    """

    def __init__(self, runtime: Runtime, keep: bool = False) -> None:
        """``keep``: the text will be gone back in, so its turns are marked."""
        self.runtime, self.keep = runtime, keep
        self.checkpoints: list[Checkpoint] = []
        self.long, self.fork = False, 0
        self._ids = torch.empty(0, dtype=torch.long)  # of the text; the caches may be behind
        self._chosen = False  # whether the retrieval cache's choice was made over all that is held

    @property
    def ids(self) -> Tensor:
        """Ids of the tokens that are held, (n,) on the CPU: none, where a change of the caches was interrupted."""
        caches = self.runtime.caches
        return self._ids[: caches.length if caches.whole else 0]

    def forget(self) -> None:
        """Empty the caches."""
        self.runtime.caches.reset()
        self.checkpoints.clear()
        self._ids, self._chosen = self._ids[:0], False

    def begin(self, tokens: Tensor, progress: Progress | None = None) -> None:
        """Read ``tokens`` (n,) into empty caches. They are ready to continue from when it ends.

        The model must be attached, gradients off. ``progress``: told (steps done, steps in all).
        """
        self.forget()
        self._read(tokens, progress)

    def prepare(self, prompt: Tensor, progress: Progress | None = None) -> int:
        """Let the caches hold ``prompt`` (n,) but for its last token; returns how many tokens of it they held before.

        What is interrupted leaves all that has been read till then. Otherwise as ``begin``.
        """
        caches, wanted, start = self.runtime.caches, prompt[:-1], self.start(prompt)
        self.long = self._is_long(prompt)
        if start is None:
            self.begin(wanted, progress)
        else:
            if start.tokens < caches.length:
                self._go_back(start)
            caches.drop_pending()
            self._ids = prompt
            missing = len(wanted) - start.tokens
            if 0 < missing <= self.runtime.settings.news and self._chosen:
                self._read_in_passes(prompt[start.tokens : -1].tolist())
            elif missing:
                self._read(wanted, progress)
        if self.keep:
            self._mark()
        return 0 if start is None else start.tokens

    def start(self, prompt: Tensor) -> Start | None:
        """How much of what is held stays, to go on with ``prompt`` (n,)."""
        caches = self.runtime.caches
        if not caches.whole or not self.turned_alike(self.long, prompt):
            return None  # something was interrupted where it should not have been, or keys are of no use
        shared = common_prefix(self.ids, prompt[:-1])
        return find_start(caches.length, self.checkpoints, shared, len(prompt) - 1, caches.can_cut)

    def turned_alike(self, long: bool, prompt: Tensor) -> bool:
        """Whether keys of a text that was ``long`` are those of a prompt (n,), where longrope turns them."""
        return long == self._is_long(prompt)

    @property
    def cuttable(self) -> bool:
        """Whether a text can be cut anywhere without a checkpoint: all that is kept of it are keys and values."""
        return self.runtime.caches.window is None and self.runtime.caches.recurrent is None

    def _is_long(self, prompt: Tensor) -> bool:
        switch = self.runtime.layout.longrope_switch
        return switch is not None and len(prompt) > switch

    def source(self) -> TextSource:
        """What is held, for the host to read where it lies: until the session goes on."""
        caches = self.runtime.caches
        caches.still()
        self._mark()
        return LiveText(
            self.ids.clone(), list(self.checkpoints), KVShape.of(self.runtime.layout), caches.full, self.long
        )

    def take(self, source: TextSource, start: Start) -> None:
        """Hold the first tokens of a text that was read before. ``start``: how many, see ``find_start``."""
        self.forget()
        parts = start.checkpoint.parts if start.checkpoint else {}
        self.runtime.caches.adopt(start.tokens, source.read, parts)
        self._ids, self.long = source.tokens, source.long
        points = [point for point in source.checkpoints if point.tokens <= start.tokens]
        self.checkpoints = [Checkpoint(point.tokens, dict(point.parts)) for point in points]  # which may lie on disk

    def _go_back(self, start: Start) -> None:
        """Cut the text."""
        point = start.checkpoint
        self.runtime.caches.cut(start.tokens, point and point.parts)
        self._chosen = False
        self.checkpoints = [point for point in self.checkpoints if point.tokens <= start.tokens]

    def _read(self, wanted: Tensor, progress: Progress | None) -> None:
        """Read on to the end of ``wanted`` (n,), all of the text but its last token."""
        runtime, caches = self.runtime, self.runtime.caches
        self._ids = wanted
        held = caches.length
        parts = (wanted[held : self.fork], wanted[max(held, self.fork) :])
        groups = [group for part in parts if len(part) for group in part.split(group_tokens(runtime.layout))]
        told = Told(progress, len(runtime.layout.layers), runtime.settings.prefill_chunk, [len(g) for g in groups])
        for group in groups:
            self._read_group(group, len(wanted), told)
            told.group_done()
            if self.keep and caches.length < len(wanted):
                self._mark()
        if not groups:
            caches.end_fill(0)
        if runtime.layout.device.type == "cuda":
            # So that its time is not taken for decoding's.
            torch.cuda.current_stream(runtime.layout.device).synchronize()

    def _read_group(self, tokens: Tensor, whole: int, progress: Progress) -> None:
        """Layer by layer, behind what is held. Where that fails, the text is what it was."""
        runtime, caches = self.runtime, self.runtime.caches
        held, before, back = caches.length, None, caches.reset
        if held:
            before = caches
            caches.begin_fill()
            back = partial(caches.restore, caches.snapshot_text())
        chunk, states = runtime.settings.prefill_chunk, runtime.states

        def work() -> None:
            self._chosen = False
            read = (runtime.model, runtime.layout, tokens, chunk, PREFILL_QUERIES, self._fill)
            told = None if caches.hidden is None else partial(self._keep_hidden, whole)
            prefill(*read, progress, states, before, whole, told)
            caches.end_fill(held + len(tokens))
            self._chosen = True

        try:
            work()
        except BaseException:
            back()
            raise

    def _read_in_passes(self, tokens: Sequence[int]) -> None:
        """Read on by passes of the target, which see all that is held."""
        settings = self.runtime.settings
        target = self.runtime.target("never" if settings.gamma == 0 else "each pass")
        for start in range(0, len(tokens), settings.news):
            nodes = chain(tokens[start : start + settings.news])
            target.score(nodes)
            target.commit(range(len(nodes)))

    def _mark(self) -> None:
        """Keep what could not be cut later, if there is any such."""
        if self.cuttable:
            return
        length = self.runtime.caches.length
        before = [point for point in self.checkpoints if point.tokens < length]
        point = Checkpoint(length, self.runtime.caches.checkpoint())
        self.checkpoints = thin([*before, point], CHECKPOINT_BYTES)

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
        self.forget()
        for index, part in enumerate(layers):
            leaving = self._fill(index, part)
            if leaving:
                leaving.wait()
        self.runtime.caches.end_fill(tokens)
        self._chosen = True

    @torch.no_grad()
    def begin_as_read(self, reading: Reading, rest: Sequence[int] = ()) -> None:
        """The same with a text that was read before, and what follows it, which is read in passes."""
        device = self.runtime.layout.device
        self.begin_with(len(reading.tokens), (on_device(part, device) for part in reading.layers))
        with on(device), attached(self.runtime.model):
            self._read_in_passes(rest)
        self._ids = torch.cat([reading.tokens, torch.tensor(rest, dtype=torch.long)])

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
        """Decode up to ``limit`` tokens; yields the new ones after each pass. What is not held is read first.

        Args:
            text: the prompt.
            limit: most new tokens. rule: how draft tokens are judged.
            drafters: of level 0; the first that can draft is asked, or the one that pays.
            stats: what is counted. stop: see ``hierarchy.decode``. ended: is there nothing to say after this token?
            progress: told how far the prefill is.
        """
        runtime, started = self.runtime, time.perf_counter()
        crossed, up = runtime.link_bytes, runtime.brought_up
        stats.prompt_tokens = len(text)
        stats.reused_tokens = self.prepare(text.ids, progress)
        self._ids = text.buffer
        resumed = time.perf_counter()
        stats.prefill_s = resumed - started
        stats.resident_link_bytes = runtime.brought_up - up
        stats.prefill_link_bytes = runtime.link_bytes - crossed - stats.resident_link_bytes
        crossed, raw = runtime.link_bytes, runtime.raw_link_bytes
        target, tree_drafter = runtime.levels(drafters, rule, stats, ended)
        for tokens in decode(target, tree_drafter, rule, text, limit, stats, stop):
            now = time.perf_counter()
            stats.ttft_s = stats.ttft_s or now - started
            stats.decode_s += now - resumed
            stats.link_bytes = runtime.link_bytes - crossed
            stats.raw_link_bytes = runtime.raw_link_bytes - raw
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
