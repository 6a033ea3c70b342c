"""What the runtime is doing, as JSON for the page: counts of the answer under way, link, memory, the last pass.

    app.include_router(live_router(state), dependencies=[the check of the API key])

Everything is read where it lies while another thread decodes. Figures of one snapshot may be a pass apart.
"""

from __future__ import annotations

import functools
import importlib.util
import weakref
from typing import Any, Protocol

import torch
from fastapi import APIRouter
from transformers import PreTrainedModel

from offload_triforce.config import Settings
from offload_triforce.errors import InputError
from offload_triforce.machine.hardware import read_measured, this_machine
from offload_triforce.runtime.runtime import Runtime
from offload_triforce.scheduler.last_pass import LastPass
from offload_triforce.scheduler.trace import Span, busy
from offload_triforce.speculation.stats import DecodeStats

# Parts of a pass that a picture of it can show.
FINEST = 1000
# Of all that ``DecodeStats`` counts, what the page shows.
SHOWN = (
    "prompt_tokens",
    "reused_tokens",
    "resumed_tokens",
    "new_tokens",
    "passes",
    "tokens_per_pass",
    "acceptance",
    "link_bytes",
    "decode_s",
    "prefill_s",
    "hidden_share",
    "ms_per_token",
    "finish_reason",
)


class LiveEngine(Protocol):
    """Of ``TriForce``, what is looked at."""

    model: PreTrainedModel
    settings: Settings

    @property
    def runtime(self) -> Runtime | None:
        """The caches; None while there are none."""

    @property
    def parked_bytes(self) -> int:
        """Of host memory, by texts beside the one in the caches."""


class EngineState(Protocol):
    """What a server knows."""

    @property
    def engine(self) -> LiveEngine:
        """The engine that is served."""

    @property
    def stats(self) -> DecodeStats | None:
        """Of the answer under way, else of the last one; None before the first."""

    @property
    def busy(self) -> bool:
        """Whether an answer is under way."""

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""


def live_router(state: EngineState) -> APIRouter:
    """``GET /page/live``. It asks nothing of the device, and waits for no answer.

    With ``?timeline=1`` the last pass comes along; while it is asked for, spans are written down (``LastPass``).
    """
    router, board = APIRouter(), Board(state)
    router.add_api_route("/page/live", board.snapshot, methods=["GET"], include_in_schema=False)
    return router


class Board:
    """Takes the snapshots."""

    def __init__(self, state: EngineState) -> None:
        self._state = state
        # The runtime must not live on because somebody looked at it: its caches would.
        self._watched: tuple[weakref.ref[Runtime], LastPass] | None = None

    def snapshot(self, timeline: bool = False) -> dict[str, Any]:
        """Everything that the page shows; in a thread of the server's."""
        state, engine = self._state, self._state.engine
        runtime, stats, under_way = engine.runtime, state.stats, state.busy
        return {
            "busy": under_way,
            "waiting": state.waiting,
            "answer": None if stats is None else describe_answer(stats),
            "link": describe_link(engine.model.device, engine.settings.link_gbps),
            "memory": None if runtime is None else describe_memory(engine, runtime, under_way, stats),
            "pass": describe_pass(self._look(runtime)) if timeline and runtime is not None else None,
            "pdf": importlib.util.find_spec("pypdf") is not None,
        }

    def _look(self, runtime: Runtime) -> list[Span]:
        watched = self._watched  # another request may replace it meanwhile
        if watched is None or watched[0]() is not runtime:
            watched = self._watched = (weakref.ref(runtime), LastPass(runtime.device))
        return watched[1].look()


def describe_answer(stats: DecodeStats) -> dict[str, Any]:
    """Counts, and the link's speed in GB/s while decoding; None before the first pass, or where nothing crosses it."""
    everything = stats.as_dict()
    crossed = bool(stats.link_bytes and stats.decode_s)
    gbps = stats.link_bytes / stats.decode_s / 1e9 if crossed else None
    return {name: everything[name] for name in SHOWN} | {"link_gbps": gbps}


def describe_link(device: torch.device, emulated: float | None) -> dict[str, Any]:
    """What the link carries at most, GB/s, and where that is known from. ``emulated``: the setting ``link_gbps``."""
    if device.type != "cuda":
        if emulated is None:
            return {"limit_gbps": None, "source": "that of host memory: no link is emulated"}
        return {"limit_gbps": emulated, "source": "that of the emulated link"}
    return _real_link(0 if device.index is None else device.index)


@functools.cache
def _real_link(index: int) -> dict[str, Any]:
    """Once per card: its name has to be asked for, and a file read."""
    try:
        machine, measured = this_machine(device=index), read_measured()
    except InputError as error:
        return {"limit_gbps": None, "source": f"unknown: {error}"}
    known = measured is not None and measured.gpu == machine.name
    source = "what `doctor` measured here" if known else "assumed of the card's slot; `doctor` measures it"
    return {"limit_gbps": machine.link_gbps, "source": source}


def describe_memory(engine: LiveEngine, runtime: Runtime, under_way: bool, stats: DecodeStats | None) -> dict[str, Any]:
    """Bytes by purpose, of the card and of host memory. Prefill and decoding use the same room, one after the other."""
    model, needs, parked = engine.model, runtime.needs, engine.parked_bytes
    reading = under_way and (stats is None or not stats.passes)
    cuda = model.device.type == "cuda"
    weights, elsewhere = weight_bytes(model)
    return {
        "context": runtime.context,
        "device_name": torch.cuda.get_device_name(model.device) if cuda else "the processor, in place of a card",
        "device": {"weights": weights} | needs.caches | (needs.prefill if reading else needs.decoding),
        "host": needs.host
        | ({"input embeddings": elsewhere} if elsewhere else {})
        | ({"parked sessions": parked} if parked else {}),
    }


def weight_bytes(model: PreTrainedModel) -> tuple[int, int]:
    """Bytes of a model's weights on its device, and elsewhere. Tied ones count once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values()
    here = sum(tensor.nbytes for tensor in tensors if tensor.device.type == model.device.type)
    return here, sum(tensor.nbytes for tensor in tensors) - here


def describe_pass(spans: list[Span]) -> dict[str, Any] | None:
    """A pass by track: milliseconds in which it was busy, bytes, and ``merge`` of what can be told apart.

    Times in milliseconds since the first span began. None where there are no spans.
    """
    if not spans:
        return None
    origin, end = spans[0].start, max(span.end for span in spans)
    tracks = {}
    for track in dict.fromkeys(span.track for span in spans):
        own = [span for span in spans if span.track == track]
        drawn = merge([((s.start - origin) * 1e3, (s.end - origin) * 1e3) for s in own], (end - origin) * 1e3 / FINEST)
        moved = sum(span.size for span in own)
        tracks[track] = {"busy_ms": round(1e3 * busy(own, track), 3), "bytes": moved, "spans": drawn}
    return {"ms": round(1e3 * (end - origin), 3), "tracks": tracks}


def merge(times: list[tuple[float, float]], gap: float) -> list[list[float]]:
    """Put together what is at most ``gap`` apart: a long text's pass has thousands of tiles, a screen fewer dots.

    ``times``: (start, end), by start. Each result is [start, end, the share of that time in which something went on].
    """
    merged: list[list[float]] = []  # the third is a duration meanwhile
    for start, end in times:
        if merged and start <= merged[-1][1] + gap:
            last = merged[-1]
            last[2] += max(0.0, end - max(start, last[1]))
            last[1] = max(last[1], end)
        else:
            merged.append([start, end, end - start])
    return [[round(a, 3), round(b, 3), round(went / (b - a), 3) if b > a else 1.0] for a, b, went in merged]
