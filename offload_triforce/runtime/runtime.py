"""One target model wired up: caches of a given capacity, the lanes of the link, and the levels that work on them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from offload_triforce.cache.full import FullCache
from offload_triforce.cache.hidden import HiddenWindow
from offload_triforce.cache.recurrent import RecurrentCache
from offload_triforce.cache.retrieval import RetrievalCache
from offload_triforce.cache.sizes import RetrievalShape
from offload_triforce.cache.target import TargetCaches
from offload_triforce.cache.window import WindowCache
from offload_triforce.config import Settings
from offload_triforce.errors import InputError, MemoryLimitError
from offload_triforce.graphs.steps import make_graphs
from offload_triforce.kernels import ops
from offload_triforce.machine.memory import free_on_host
from offload_triforce.model.layout import ModelLayout
from offload_triforce.model.lock import awaited
from offload_triforce.model.prefill import Progress
from offload_triforce.planner.sizes import check_memory, group_tokens, make_plan, make_shape, work_out
from offload_triforce.runtime.levels import Choosing, RetrievalLevel, TargetLevel
from offload_triforce.scheduler.device import CudaDevice, Device, on
from offload_triforce.scheduler.emulated import EmulatedDevice
from offload_triforce.scheduler.host import HostDevice
from offload_triforce.scheduler.pipeline import TileStream
from offload_triforce.scheduler.plan import TilePlan
from offload_triforce.scheduler.states import HostStates
from offload_triforce.scheduler.store import TileStore
from offload_triforce.speculation.acceptance import AcceptanceRule
from offload_triforce.speculation.adaptive import AcceptanceModel, DraftController, make_costs
from offload_triforce.speculation.direct import MOST, DirectDrafter, RestingDrafter
from offload_triforce.speculation.draft_selector import Drafter, DraftSelector
from offload_triforce.speculation.hierarchy import Proposer
from offload_triforce.speculation.ngram import NgramDrafter
from offload_triforce.speculation.stats import DecodeStats
from offload_triforce.speculation.tree_drafter import Limits, TreeDrafter
from offload_triforce.speculation.trials import Trials

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
        keep_hidden: bool = False,
    ) -> None:
        """Allocate everything; pinning the host memory goes on in the background.

        Args:
            model, layout: the target. settings: how to run.
            context: most tokens of prompt and answer together.
            pinning: told (bytes pinned, bytes in all).
            device: what copies, instead of the model's own, which on a CPU has an emulated link of
                ``settings.link_gbps`` or none. It is closed with this runtime, or where this fails: it may hold pinned
                memory.
            keep_hidden: the newest hidden states, which a drafter reads (``cache/hidden.py``).

        Raises:
            MemoryLimitError, InputError: before anything is allocated.
        """
        self.model, self.layout, self.settings, self.context = model, layout, settings, context
        self._keep_hidden = keep_hidden
        self._open: list[Device | TileStore | HostStates] = [] if device is None else [device]  # closed in this order
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
            coded = plan is not None and plan.coded_bytes > 0
            device = _make_device(layout.device, settings.link_gbps, coded)
            self._open.append(device)
        self.device = device
        try:
            self.caches = self._make_caches(plan, shape, pinning)
            self.states = self._make_states()
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "alloc" not in str(error):  # what torch says of full memory
                raise
            raise MemoryLimitError(f"the caches for {context:,} tokens could not be allocated: {error}") from error
        most, make_view = settings.width + settings.gamma1, self.caches.static_view
        self.graphs = make_graphs(model, layout, make_view, most) if settings.graphs else None

    def _make_caches(self, plan: TilePlan | None, shape: RetrievalShape, pinning: Progress | None) -> TargetCaches:
        layout, settings = self.layout, self.settings
        where = {"dtype": layout.dtype, "device": layout.device}
        block, news, drafts = settings.block, settings.news, settings.room
        full = retrieval = window = recurrent = None
        if plan is not None:
            told = pinning and awaited(pinning)  # the prefill waits for what is pinned
            store = TileStore(plan, layout.dtype, self.device, told, free_on_host)
            self._open.append(store)
            stream = TileStream(store, self.device, layout.dtype)
            full = FullCache(stream, shape.tail_needed(news), block, news, **where)
            heads, dim = plan.kv_heads, plan.head_dim
            retrieval = RetrievalCache(plan.layers, heads, dim, shape, news, drafts, **where, context=self.context)
        if layout.sliding:
            windows = [layout.layers[i].window for i in layout.sliding]
            first = layout.layers[layout.sliding[0]]
            window = WindowCache(windows, first.kv_heads, first.head_dim, self.context, block, **where, drafts=drafts)
        if layout.recurrent:
            size = layout.layers[layout.recurrent[0]]
            recurrent = RecurrentCache(len(layout.recurrent), size, block, drafts, **where)
        hidden = None
        if self._keep_hidden:
            width = self.model.config.get_text_config().hidden_size
            hidden = HiddenWindow(settings.draft_cache, settings.draft_sink, width, **where)
        groups = [layout.full, layout.sliding, layout.recurrent]
        return TargetCaches(groups, full, retrieval, window, recurrent, hidden)

    def _make_states(self) -> HostStates | None:
        """Where hidden states wait in a prefill; None is on the device."""
        settings, config = self.settings, self.model.config.get_text_config()
        if settings.hidden_states != "host":
            return None
        group = min(self.context, group_tokens(self.layout))
        chunk = min(settings.prefill_chunk, group)
        states = HostStates(self.device, group, config.hidden_size, chunk, self.model.dtype)
        self._open.append(states)
        return states

    @property
    def brought_up(self) -> int:
        """Of the bytes that have crossed the link so far, those of tiles that became resident after a prefill."""
        return 0 if self.caches.full is None else self.caches.full.stream.store.late.moved

    @property
    def link_bytes(self) -> int:
        """Wire bytes that have crossed the link so far, both directions."""
        return self.device.incoming.moved + self.device.outgoing.moved

    @property
    def raw_link_bytes(self) -> int:
        """What would have crossed it without coding."""
        saved = 0 if self.caches.full is None else self.caches.full.stream.store.saved
        return self.link_bytes + saved

    def full_kv_bytes(self, tokens: int) -> int:
        """Bytes that a full KV cache of that many tokens holds; sliding layers hold their window, others a state."""
        return sum(self.layout.held_bytes(layer, tokens) for layer in range(len(self.layout.layers)))

    def target(self, refresh: Choosing, rests: Callable[[], bool] = lambda: False) -> TargetLevel:
        """Level 2 over these caches. ``rests``: see ``TargetLevel``."""
        return TargetLevel(self.model, self.caches, refresh, rests)

    def levels(
        self, drafters: Sequence[Drafter], rule: AcceptanceRule, stats: DecodeStats, ended: Callable[[int], bool]
    ) -> tuple[TargetLevel, Proposer]:
        """Level 2, and level 1 with its drafters, for one text.

        A CPU that attends to tiles where they lie has cheap passes: there, level 1 has to show first that it pays.
        Look-up costs nothing, so that it may draft for the target itself; whoever names a model wants it to be asked.
        """
        settings, costs = self.settings, make_costs(self.settings.draft_cost)
        free = all(isinstance(drafter, NgramDrafter) for drafter in drafters)
        trials = Trials() if self.device.unified and costs.timed and settings.adaptive and free else None
        controller = DraftController(costs, trials)
        tree_drafter = TreeDrafter(
            RetrievalLevel(self.model, self.caches, self.graphs),
            DraftSelector(drafters, settings.gamma1, settings.adaptive, self.device if costs.timed else None),
            rule,
            limits_of(settings),
            AcceptanceModel(rule.prior),
            controller,
            ended,
            stats,
            self.device,
        )
        target = self.target(choosing(settings), lambda: controller.rests)
        if trials is None:
            return target, tree_drafter
        return target, RestingDrafter(tree_drafter, DirectDrafter(DraftSelector(drafters, MOST, adaptive=True), stats))

    def close(self) -> None:
        """Stop the copies. The memory is given back with the last reference to the caches."""
        _close(self._open)


def limits_of(settings: Settings) -> Limits:
    """How large a tree may become, as the settings have it."""
    return Limits(
        depth=settings.gamma,
        nodes=settings.most_draft_tokens,
        topk=settings.topk,
        width=settings.width,
        room=settings.room,
        adaptive=settings.adaptive,
        overlap=settings.overlap and settings.gamma > 0,
    )


def _check_kernels(device: torch.device) -> None:
    if device.type != "cuda":
        return
    with on(device):
        found = ops.what_stops_triton()
    if found is not None:
        raise InputError(f"Triton's kernels do not run here ({found.reason}); {found.remedy}")


def _make_device(device: torch.device, gbps: float | None, coded: bool) -> Device:
    if device.type == "cuda":
        return CudaDevice(device)
    return HostDevice() if gbps is None and not coded else EmulatedDevice(gbps)  # coded tiles have a way to go


def _close(resources: list[Device | TileStore | HostStates]) -> None:
    try:
        while resources:
            resources.pop(0).close()
    finally:
        if resources:  # one could not be closed: the others still can
            _close(resources)
