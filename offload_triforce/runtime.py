"""One target model wired up: caches of a given capacity, the lanes of the link, prefill and decoding."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from offload_triforce.cache.full import FullCache
from offload_triforce.cache.retrieval import RetrievalCache
from offload_triforce.cache.sizes import RetrievalShape
from offload_triforce.cache.window import WindowCache
from offload_triforce.config import Settings
from offload_triforce.errors import InputError, MemoryLimitError
from offload_triforce.kernels import ops
from offload_triforce.memory import check_memory, work_out
from offload_triforce.model.graphs import make_graphs
from offload_triforce.model.layout import ModelLayout
from offload_triforce.model.prefill import Progress, prefill
from offload_triforce.planner.sizes import make_plan, make_shape
from offload_triforce.scheduler.device import CudaDevice, Device
from offload_triforce.scheduler.emulated import EmulatedDevice
from offload_triforce.scheduler.pipeline import TileStore, TileStream
from offload_triforce.scheduler.plan import TilePlan
from offload_triforce.speculation.draft import Draft
from offload_triforce.speculation.drafting import Drafting
from offload_triforce.speculation.economy import History, Pace
from offload_triforce.speculation.growth import Limits, Middle
from offload_triforce.speculation.hierarchy import decode
from offload_triforce.speculation.levels import Choosing, FullLevel, RetrievalLevel, TargetCaches
from offload_triforce.speculation.rules import Rule
from offload_triforce.speculation.text import TokenText
from offload_triforce.stats import DecodeStats

# Newest queries of the prompt that make the first choice of chunks: about as many as a pass verifies later.
PREFILL_QUERIES = 16


def choosing(settings: Settings) -> Choosing:
    """When passes choose chunks for the retrieval cache."""
    return "never" if settings.gamma == 0 else "each pass" if settings.refresh else "once"


class Runtime:
    """The caches of one target model and everything that works on them. One text at a time."""

    def __init__(
        self,
        model: PreTrainedModel,
        layout: ModelLayout,
        settings: Settings,
        context: int,
        pinning: Progress | None = None,
        device: Device | None = None,
    ) -> None:
        """Allocate everything; pinning the host memory goes on in the background.

        Args:
            model, layout: the target. settings: how to run.
            context: most tokens of prompt and answer together.
            pinning: told (bytes pinned, bytes in all).
            device: what copies, instead of the model's device and an emulated link of ``settings.link_gbps``. It is
                closed with this runtime, or where this fails: it may hold pinned memory.

        Raises:
            MemoryLimitError, InputError: before anything is allocated.
        """
        self.model, self.layout, self.settings, self.context = model, layout, settings, context
        self._open: list[Device | TileStore] = [] if device is None else [device]  # closed in this order
        weakref.finalize(self, _close, self._open)
        try:
            self._set_up(device, pinning)
        except BaseException:
            self.close()
            raise

    def _set_up(self, device: Device | None, pinning: Progress | None) -> None:
        model, layout, settings, context = self.model, self.layout, self.settings, self.context
        if settings.link_gbps is not None and layout.device.type == "cuda":
            raise InputError("link_gbps emulates a link on the CPU; on a CUDA device the real one is used")
        _check_kernels(layout.device)
        self.plan = plan = make_plan(layout, settings, context)
        shape = make_shape(settings, context)
        self.needs = work_out(model, layout, settings, shape, plan, context)
        check_memory(self.needs, layout.device, context)
        if device is None:
            device = _make_device(layout.device, settings.link_gbps)
            self._open.append(device)
        self.device = device
        try:
            self.caches = self._make_caches(plan, shape, pinning)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "alloc" not in str(error):  # what torch says of full memory
                raise
            raise MemoryLimitError(f"the caches for {context:,} tokens could not be allocated: {error}") from error
        most, make_view = settings.width + settings.gamma1, self.caches.static_view
        self.graphs = make_graphs(model, layout, make_view, most) if settings.graphs else None

    def _make_caches(self, plan: TilePlan | None, shape: RetrievalShape, pinning: Progress | None) -> TargetCaches:
        layout, settings = self.layout, self.settings
        where = {"dtype": layout.dtype, "device": layout.device}
        block, news, drafts = settings.block, settings.news, settings.drafts
        full = retrieval = window = None
        if plan is not None:
            store = TileStore(plan, layout.dtype, self.device, pinning)
            self._open.append(store)
            stream = TileStream(store, self.device, layout.dtype)
            full = FullCache(stream, shape.tail_needed(news), block, news, **where)
            heads, dim = plan.kv_heads, plan.head_dim
            retrieval = RetrievalCache(plan.layers, heads, dim, shape, news, drafts, **where, context=self.context)
        if layout.sliding:
            windows = [layout.layers[i].window for i in layout.sliding]
            first = layout.layers[layout.sliding[0]]
            window = WindowCache(windows, first.kv_heads, first.head_dim, self.context, block, **where, drafts=drafts)
        return TargetCaches(layout, full, retrieval, window)

    @property
    def link_bytes(self) -> int:
        """Bytes that have crossed the link so far, both directions."""
        return self.device.incoming.moved + self.device.outgoing.moved

    def full_kv_bytes(self, tokens: int) -> int:
        """Bytes that a full KV cache of that many tokens holds; sliding layers hold their window."""
        held = 0
        for index, layer in enumerate(self.layout.layers):
            reach = tokens if layer.window is None else min(tokens, layer.window)
            held += reach * self.layout.token_bytes(index)
        return held

    def prefill(self, tokens: Tensor, progress: Progress | None) -> None:
        """Read ``tokens`` (n,) into empty caches. They are ready to decode from when it ends."""
        self.caches.reset()
        if len(tokens):
            prefill(
                self.model,
                self.layout,
                tokens,
                self.settings.prefill_chunk,
                PREFILL_QUERIES,
                self.caches.fill_layer,
                progress,
            )
        self.caches.end_fill(len(tokens))
        if self.layout.device.type == "cuda":
            torch.cuda.current_stream(self.layout.device).synchronize()  # so that its time is not taken for decoding's

    def decode(
        self,
        text: TokenText,
        limit: int,
        drafts: Sequence[Draft],
        rule: Rule,
        stats: DecodeStats,
        stop: Callable[[TokenText], bool],
        ended: Callable[[int], bool],
        progress: Progress | None,
        filled: bool = False,
    ) -> Iterator[list[int]]:
        """Prefill, then decode up to ``limit`` tokens; yields the new ones after each pass.

        Args:
            text: the prompt. limit: most new tokens. rule: how guesses are judged.
            drafts: who guesses for the retrieval level; the first that can, or the one that pays.
            stats: what is counted. stop: see ``hierarchy.decode``. ended: is there nothing to say after this token?
            progress: told how far the prefill is.
            filled: the caches hold all but the last token of the prompt already.
        """
        started = time.perf_counter()
        crossed = self.link_bytes
        stats.prompt_tokens = len(text)
        if not filled:
            self.prefill(text.ids[:-1], progress)
        resumed = time.perf_counter()
        stats.prefill_s = resumed - started
        stats.prefill_link_bytes, crossed = self.link_bytes - crossed, self.link_bytes
        target, middle = self.levels(drafts, rule, stats, ended)
        for tokens in decode(target, middle, rule, text, limit, stats, stop):
            now = time.perf_counter()
            stats.ttft_s = stats.ttft_s or now - started
            stats.decode_s += now - resumed
            stats.link_bytes = self.link_bytes - crossed
            stats.full_kv_bytes = self.full_kv_bytes(len(text) - 1)  # the newest token has no KV yet
            yield tokens
            resumed = time.perf_counter()  # the reader's own time does not count

    def levels(
        self, drafts: Sequence[Draft], rule: Rule, stats: DecodeStats, ended: Callable[[int], bool]
    ) -> tuple[FullLevel, Middle]:
        """The target, and who guesses for it."""
        settings = self.settings
        limits = Limits(
            depth=settings.gamma,
            nodes=settings.nodes,
            branches=settings.branches,
            width=settings.width,
            room=settings.drafts,
            adaptive=settings.adaptive,
            ahead=settings.ahead and settings.gamma > 0,
        )
        middle = Middle(
            RetrievalLevel(self.model, self.caches, self.graphs),
            Drafting(drafts, settings.gamma1, settings.adaptive, timed=settings.draft_cost is None),
            rule,
            limits,
            History(rule.prior),
            Pace(settings.draft_cost),
            ended,
            stats,
        )
        return FullLevel(self.model, self.caches, choosing(settings)), middle

    def close(self) -> None:
        """Stop the copies. The memory is given back with the last reference to the caches."""
        _close(self._open)


def _check_kernels(device: torch.device) -> None:
    if device.type != "cuda":
        return
    with on(device):
        reason = ops.what_stops_triton()
    if reason is not None:
        raise InputError(
            f"Triton cannot compile its kernels here ({reason}); install a C compiler and Python's headers (gcc and "
            "python3-dev), or set OFFLOAD_TRIFORCE_KERNELS=torch, which is slower"
        )


def on(device: torch.device) -> AbstractContextManager[None]:
    """Make a CUDA device the current one: Triton launches its kernels there, wherever their tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _make_device(device: torch.device, gbps: float | None) -> Device:
    return CudaDevice(device) if device.type == "cuda" else EmulatedDevice(gbps)


def _close(resources: list[Device | TileStore]) -> None:
    try:
        while resources:
            resources.pop(0).close()
    finally:
        if resources:  # one could not be closed: the others still can
            _close(resources)
