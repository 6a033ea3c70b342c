"""A session: one text in a runtime's caches. It is begun, by reading it or with what was read before, and continued."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from offload_triforce.errors import TriForceError
from offload_triforce.model.adapter import attached
from offload_triforce.model.layer_view import LayerPart
from offload_triforce.model.prefill import Progress
from offload_triforce.planner.sizes import CHECKPOINT_BYTES, group_tokens
from offload_triforce.runtime.group_reading import GroupReading, fill
from offload_triforce.runtime.held import Checkpoint, KVShape, LiveText, TextSource, thin
from offload_triforce.runtime.ids import common_prefix
from offload_triforce.runtime.part import PartRead
from offload_triforce.runtime.prefix import Start, Told, find_start
from offload_triforce.runtime.reading import Reading, on_device
from offload_triforce.runtime.runtime import Runtime
from offload_triforce.scheduler.device import on
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

    def __init__(self, runtime: Runtime, keep: bool = False, room: Callable[[int], bool] = lambda _: True) -> None:
        """``keep``: the text will be gone back in, so its turns are marked, and what is stopped is kept in part.

        ``room``: whether host memory may hold so many bytes more.
        """
        self.runtime, self.keep, self.room = runtime, keep, room
        self.checkpoints: list[Checkpoint] = []
        self.long, self.fork = False, 0
        self._part: PartRead | None = None
        self._ids = torch.empty(0, dtype=torch.long)  # of the text; the caches may be behind
        self._chosen = False  # whether the retrieval cache's choice was made over all that is held

    @property
    def part(self) -> PartRead | None:
        """Of the tokens behind those that are held, what a stopped prefill has read, if it has.

        None where a change of the caches was interrupted: what it follows is not there.
        """
        part = self._part
        return part if part is not None and part.held == len(self.ids) else None

    @property
    def ids(self) -> Tensor:
        """Ids of the tokens that are held, (n,) on the CPU: none, where a change of the caches was interrupted."""
        caches = self.runtime.caches
        return self._ids[: caches.length if caches.whole else 0]

    def forget(self) -> None:
        """Empty the caches."""
        self.runtime.caches.reset()
        self.checkpoints.clear()
        self._ids, self._chosen, self._part = self._ids[:0], False, None

    def begin(self, tokens: Tensor, progress: Progress | None = None) -> None:
        """Read ``tokens`` (n,) into empty caches. They are ready to continue from when it ends.

        The model must be attached, gradients off. ``progress``: told (steps done, steps in all).
        """
        self.forget()
        self._read(tokens, progress)

    def prepare(self, prompt: Tensor, progress: Progress | None = None) -> Start:
        """Let the caches hold ``prompt`` (n,) but for its last token; returns from where they were filled.

        What is interrupted leaves all that has been read till then. Otherwise as ``begin``.
        """
        caches, wanted, start = self.runtime.caches, prompt[:-1], self.start(prompt)
        self.long = self._is_long(prompt)
        if start is None:
            self.begin(wanted, progress)
        else:
            usable = self.usable(self.part, start.tokens, prompt) if start.part else 0
            self._part = self.part.cut(usable) if usable else None
            if start.tokens < caches.length:
                self._go_back(start)
            caches.drop_pending()
            self._ids = prompt
            missing = len(wanted) - start.tokens
            if 0 < missing <= self.runtime.settings.news and self._chosen and not start.part:
                self._read_in_passes(prompt[start.tokens : -1].tolist())
            elif missing:
                self._read(wanted, progress)
        if self.keep:
            self._mark()
        return start or Start(0)

    def start(self, prompt: Tensor) -> Start | None:
        """How much of what is held stays, to go on with ``prompt`` (n,)."""
        caches = self.runtime.caches
        if not caches.whole or not self.turned_alike(self.long, prompt):
            return None  # something was interrupted where it should not have been, or keys are of no use
        shared = common_prefix(self.ids, prompt[:-1])
        if shared == caches.length and (usable := self.usable(self.part, shared, prompt)):
            return Start(shared, None, self.part_worth(self.part, usable))
        return find_start(caches.length, self.checkpoints, shared, len(prompt) - 1, caches.can_cut)

    def usable(self, part: PartRead | None, held: int, prompt: Tensor) -> int:
        """How much of what was read in part is of use for a prompt (n,) of which ``held`` tokens are held: tokens."""
        if part is None or (part.held, part.chunk) != (held, self.runtime.settings.prefill_chunk):
            return 0
        return part.usable(prompt[held:-1], self.cuttable)

    def turned_alike(self, long: bool, prompt: Tensor) -> bool:
        """Whether keys of a text that was ``long`` are those of a prompt (n,), where longrope turns them."""
        return long == self._is_long(prompt)

    @property
    def worth(self) -> int:
        """Reading so many tokens would be about as much work as what there is."""
        return len(self.ids) + self.part_worth(self.part)

    def part_worth(self, part: PartRead | None, usable: int | None = None) -> int:
        """The same of what was read in part, see ``PartRead.worth``; of ``usable`` tokens of it, or of all."""
        if part is None:
            return 0
        return part.worth(len(self.runtime.layout.layers), len(part.tokens) if usable is None else usable)

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
        shape = KVShape.of(self.runtime.layout)
        return LiveText(self.ids.clone(), list(self.checkpoints), shape, caches.full, self.long, self.part)

    def take(self, source: TextSource, start: Start) -> None:
        """Hold the first tokens of a text that was read before. ``start``: how many, see ``find_start``."""
        self.forget()
        part = source.part if start.part else None
        if part is not None:
            part = part.in_memory()
            config = self.runtime.model.config.get_text_config()
            part.check(self.runtime.layout, config.hidden_size, bool(getattr(config, "num_kv_shared_layers", 0)))
        parts = start.checkpoint.parts if start.checkpoint else {}
        if start.tokens:
            self.runtime.caches.adopt(start.tokens, source.read, parts)
        self._ids, self.long = source.tokens, source.long
        self._part = part
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
        first = [] if self.part is None else [self.part.tokens]  # as it was cut then, wherever it would be now
        held = caches.length + sum(map(len, first))
        parts = (wanted[held : self.fork], wanted[max(held, self.fork) :])
        groups = first + [group for part in parts if len(part) for group in part.split(group_tokens(runtime.layout))]
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
        """Layer by layer, behind what is held. Where that is stopped, the text is what it was, beside a part."""
        caches = self.runtime.caches
        reading = GroupReading(self.runtime, tokens, whole, self.part)
        back = caches.reset
        if caches.length:
            caches.begin_fill()
            back = partial(caches.restore, caches.snapshot_text())
        self._chosen = False
        try:
            reading.run(progress)
            self._chosen = True
        except BaseException as error:
            try:
                if self.keep:
                    self._keep_part(reading, error)
            finally:
                reading.end()  # late tiles come up into the room that it took
                back()
            raise
        finally:
            reading.end()
        self._part = None

    def _keep_part(self, reading: GroupReading, error: BaseException) -> None:
        """What was read of a group, if it was stopped; else what an earlier one had come to. After a fault, nothing."""
        with contextlib.suppress(TriForceError, MemoryError, RuntimeError):  # memory is short: it is read again
            if not reading.was_stopped(error):
                self._part = None
            elif (part := reading.stopped(self.room)) is not None:
                self._part = part

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
        length = self.runtime.caches.length
        if self.cuttable or not length:
            return
        before = [point for point in self.checkpoints if point.tokens < length]
        point = Checkpoint(length, self.runtime.caches.checkpoint())
        self.checkpoints = thin([*before, point], CHECKPOINT_BYTES)

    def begin_with(self, tokens: int, layers: Iterable[LayerPart]) -> None:
        """The same with ``tokens`` tokens, what each layer makes of which is there: ``layers``, on the device."""
        self.forget()
        for index, part in enumerate(layers):
            leaving = fill(self.runtime, index, part)
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
        held = self.prepare(text.ids, progress)
        stats.reused_tokens, stats.resumed_tokens = held.tokens, held.part
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
