"""One group of tokens is read into the caches, layer by layer; what is stopped can be kept in part."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from offload_triforce.model.layer_view import AttentionPart, LayerPart, RecurrentPart
from offload_triforce.model.prefill import Prefill, Progress
from offload_triforce.model.recording import Stretch
from offload_triforce.runtime.part import PartRead, taken_apart
from offload_triforce.runtime.runtime import PREFILL_QUERIES, Runtime
from offload_triforce.scheduler.store import Leaving


def part_bytes(runtime: Runtime, tokens: int, layers: int) -> int:
    """About as much is kept of so many tokens that are through so many layers."""
    config, layout = runtime.model.config.get_text_config(), runtime.layout
    through = range(min(layers, len(layout.layers)))
    held = sum(layout.held_bytes(layer, tokens) for layer in through)
    queries = sum(layout.layers[layer].head_dim for layer in through if layer in layout.full)
    queries *= PREFILL_QUERIES * config.num_attention_heads
    return held + (tokens * config.hidden_size + queries) * runtime.model.dtype.itemsize


class GroupReading:
    """One group being read into a runtime's caches, behind what they hold. To be followed by ``end``."""

    def __init__(self, runtime: Runtime, tokens: Tensor, whole: int, part: PartRead | None) -> None:
        """``whole``: tokens of the text that it is read for. ``part``: of the same group, to go on with."""
        self._runtime, self._tokens, self._whole, self._part = runtime, tokens, whole, part
        self._held, chunk = runtime.caches.length, runtime.settings.prefill_chunk
        stretch = Stretch(runtime.layout, tokens, self._held, whole)
        before = runtime.caches if self._held else None
        self._prefill = Prefill(runtime.model, stretch, chunk, PREFILL_QUERIES, runtime.states, before)

    def run(self, progress: Progress) -> None:
        """Read it."""
        hidden, told, halt = self._runtime.caches.hidden, None, None
        if self._part is not None:
            halt, rows = self._part.halt(self._runtime.layout), self._part.hidden
            if hidden is not None and rows and rows["rows"].shape == hidden.shape:
                hidden.restore(rows)
        if hidden is not None:
            told = partial(self._keep_hidden, self._whole)
        self._prefill.run(partial(fill, self._runtime), progress, told, halt)
        self._prefill.end()
        self._runtime.caches.end_fill(self._held + len(self._tokens))

    def end(self) -> None:
        """Give back what it takes on the device."""
        self._prefill.end()

    def was_stopped(self, error: BaseException) -> bool:
        """Whether it ended with ``error`` because it was to, and not by a fault."""
        return self._prefill.was_stopped(error)

    def stopped(self, room: Callable[[int], bool]) -> PartRead | None:
        """What is kept of it, before the caches are rolled back, if anything can be.

        ``room``: whether so many bytes may be kept.
        """
        runtime, caches = self._runtime, self._runtime.caches
        if not room(part_bytes(runtime, len(self._tokens), self._prefill.layer + 1)):
            return None
        caches.land_fill()
        halt = self._prefill.halt(self._filled)
        if halt is None:
            return None
        ending = halt.layer + bool(halt.chunk) >= len(runtime.layout.layers)
        hidden = caches.hidden.snapshot() if ending and caches.hidden is not None else {}
        kept, chunk = taken_apart(halt, hidden), runtime.settings.prefill_chunk
        return PartRead(self._held, self._tokens.clone(), chunk, halt.layer, halt.chunk, kept)

    def _filled(self, layer: int, done: AttentionPart | None) -> LayerPart:
        caches = self._runtime.caches
        if done is None:
            return RecurrentPart(*(tensor.to("cpu", copy=True) for tensor in caches.load_state(layer)))
        kv = caches.filled(layer, done.params.window, self._held, self._held + len(self._tokens))
        return AttentionPart(kv, done.queries.cpu(), done.params)

    def _keep_hidden(self, total: int, part: range, states: Tensor) -> None:
        """``part`` of a text of ``total`` tokens is through all layers: keep what a drafter may want of it."""
        window, norm = self._runtime.caches.hidden, self._runtime.model.get_decoder().norm
        for piece in window.wanted(part, total):
            window.fill(piece.start, norm(states[piece.start - part.start : piece.stop - part.start]))


def fill(runtime: Runtime, layer: int, part: LayerPart) -> Leaving | None:
    """What a layer has made of a text, into the caches."""
    if isinstance(part, RecurrentPart):
        runtime.caches.fill_state(layer, *part)
        return None
    return runtime.caches.fill(layer, *part)
