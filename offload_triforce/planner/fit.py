"""What lies where, in bytes, for a model at a context: by the runtime's own rules, before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from offload_triforce.config import Settings
from offload_triforce.model.outline import ModelShape
from offload_triforce.planner.sizes import make_plan, make_shape, work_out
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
    """Bytes by purpose, once everything is loaded; and the most that loading takes."""

    plan: TilePlan | None
    device: dict[str, int]
    host: dict[str, int]
    loading: Loading

    @property
    def vram_bytes(self) -> int:
        """Most bytes on the device at one time: mostly while the last of the prompt is read."""
        return max(sum(self.device.values()), self.loading.device)

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
    device = {"weights": model.weights.total} | {part: size for part, size in needs.caches.items() if size}
    if draft is not None:
        layers = range(len(draft.layout.layers))
        cache = settings.draft_cache * sum(draft.layout.token_bytes(layer) for layer in layers)
        device["draft"] = cache + (0 if draft is model else draft.weights.total)
    device |= {f"prefill: {part}": size for part, size in needs.prefill.items()}
    device["CUDA itself"] = DEVICE_OVERHEAD
    host = {"tiles of the full cache": needs.host, "the process": HOST_OVERHEAD}
    return Footprint(plan, device, host, loading(model, draft))


def loading(model: ModelShape, draft: ModelShape | None = None) -> Loading:
    """What loading takes, of the target and then of a draft model.

    Weights in a folder go to the device one by one. Those of a GGUF file are all unpacked in host memory first; what is
    to be packed again is so on the device, one weight after the other.
    """
    models = [model] if draft is None or draft is model else [model, draft]
    device, host, there = 0, HOST_OVERHEAD, DEVICE_OVERHEAD
    for one in models:
        device = max(device, there + one.weights.total + one.weights.largest)
        there += one.weights.total
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
