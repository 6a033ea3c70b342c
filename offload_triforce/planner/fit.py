"""What lies where, in bytes, for a model at a context: by the runtime's own rules, before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from offload_triforce.config import Settings
from offload_triforce.model.outline import ModelShape
from offload_triforce.planner.sizes import draft_bytes, hidden_bytes, make_plan, make_shape, work_out
from offload_triforce.scheduler.plan import TilePlan

# Device memory that no allocation of ours accounts for: CUDA's own context, cuBLAS' workspaces, captured graphs.
# About 0.5 GB of it is there as soon as a process touches the card; an assumption, to be measured.
DEVICE_OVERHEAD = 600 << 20
# The process itself: Python, torch and the CUDA libraries.
HOST_OVERHEAD = 2 << 30


@dataclass(frozen=True)
class Loading:
    """Most bytes at one time while weights are loaded, before there are caches."""

    device: int
    host: int


@dataclass(frozen=True)
class Footprint:
    """Bytes by purpose, once everything is loaded; and the most that loading takes.

    Attributes:
        held: on the device all along. prefill: there while the prompt is read. decoding: there from then on.
    """

    plan: TilePlan | None
    held: dict[str, int]
    prefill: dict[str, int]
    decoding: dict[str, int]
    host: dict[str, int]
    loading: Loading

    @property
    def device(self) -> dict[str, int]:
        """All that is on the device at some time."""
        phases = {"prefill": self.prefill, "decoding": self.decoding}
        return self.held | {f"{phase}: {part}": size for phase, held in phases.items() for part, size in held.items()}

    @property
    def prefill_bytes(self) -> int:
        """Bytes on the device while the prompt is read."""
        return sum(self.held.values()) + sum(self.prefill.values())

    @property
    def decoding_bytes(self) -> int:
        """Bytes on the device while decoding."""
        return sum(self.held.values()) + sum(self.decoding.values())

    @property
    def vram_bytes(self) -> int:
        """Most bytes on the device at one time."""
        return max(self.prefill_bytes, self.decoding_bytes, self.loading.device)

    @property
    def host_bytes(self) -> int:
        """Most bytes of host memory at one time."""
        return max(sum(self.host.values()), self.loading.host)


def footprint(model: ModelShape, settings: Settings, context: int, draft: ModelShape | None = None) -> Footprint:
    """What a text of ``context`` tokens takes with a model and, if there is one, a draft model.

    Raises:
        InputError: a budget that leaves no room for a chunk.
    """
    plan = make_plan(model.layout, settings, context)
    needs = work_out(model, model.layout, settings, make_shape(settings, context), plan, context)
    embedding = 0 if settings.embeddings == "device" else model.embedding
    device = {"weights": model.weights.total - embedding} | needs.caches
    if draft is not None:
        weights = 0 if draft is model else draft.weights.total
        held = draft_bytes(draft.layout, settings.draft_cache)
        device["draft"] = weights + held + hidden_bytes(draft.layout, settings, draft.reads_hidden)
    device["CUDA itself"] = DEVICE_OVERHEAD
    host = {"tiles of the full cache": 0} | needs.host | {"input embeddings": embedding, "the process": HOST_OVERHEAD}
    prefill, decoding = _taken(needs.prefill), _taken(needs.decoding)
    return Footprint(plan, _taken(device), prefill, decoding, _taken(host), loading(model, draft, embedding))


def _taken(parts: dict[str, int]) -> dict[str, int]:
    return {part: size for part, size in parts.items() if size or part == "tiles of the full cache"}


def loading(model: ModelShape, draft: ModelShape | None = None, embedding: int = 0) -> Loading:
    """What loading takes, of the target and then of a draft model. ``embedding``: bytes of the target's input
    embeddings, where they stay in host memory.

    Weights in a folder go to the device one by one. Those of a GGUF file are all unpacked in host memory first; what is
    to be packed again is so on the device, one weight after the other.
    """
    models = [model] if draft is None or draft is model else [model, draft]
    device, host, there = 0, HOST_OVERHEAD, DEVICE_OVERHEAD
    for one in models:
        total = one.weights.total - (embedding if one is model else 0)
        device = max(device, there + total + one.weights.largest)
        there += total
        if one.gguf is not None:
            host = max(host, HOST_OVERHEAD + unpacked_bytes(one))
    return Loading(device, host)


def unpacked_bytes(model: ModelShape) -> int:
    """Bytes of all weights in the model's dtype, as a GGUF file is unpacked to."""
    return model.weights.parameters * model.layout.dtype.itemsize


def missing(used: Footprint, memory: int, host: int | None) -> list[dict[str, int | str]]:
    """What does not fit, and by how many bytes."""
    gaps = [("device memory", used.vram_bytes - memory)]
    if host is not None:
        gaps.append(("host memory", used.host_bytes - host))
    return [{"what": what, "bytes": gap} for what, gap in gaps if gap > 0]
