"""Layer-major prefill: all chunks of the prompt through one layer, then the next.

Only one layer's KV is on the device at a time. Host traffic is one copy of each layer's KV from the device to the
host and nothing back, but for the hidden states where they wait in host memory. No family-specific code: the base
model is run once per chunk with every layer replaced by an identity that records its arguments (``recording``), and the
layers are then replayed in their own order.

It can be stopped after any step (one chunk through one layer), and another prefill goes on from there: see ``Halt``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from offload_triforce.model.layer_view import AttentionPart, Beginning, LayerPart, LayerView
from offload_triforce.model.layers import layers_of
from offload_triforce.model.layout import ModelLayout
from offload_triforce.model.recording import Call, Stretch, handed_on, record
from offload_triforce.scheduler.states import DeviceStates, HiddenStates
from offload_triforce.scheduler.store import Leaving

Progress = Callable[[int, int], None]
LayerDone = Callable[[int, LayerPart], "Leaving | None"]
# Told which tokens are through all layers, and their hidden states [n, width], before the decoder's last norm.
TokensDone = Callable[[range, Tensor], None]
# What a layer that is through has made of the tokens, in host memory, see ``Halt.parts``. Given is what was handed on
# of it but for keys and values; None of a recurrent layer.
Filled = Callable[[int, "AttentionPart | None"], LayerPart]


@dataclass(frozen=True)
class Halt:
    """Where a prefill was stopped, and what another one of the same tokens and chunks needs to go on from there.

    Attributes:
        layer: all tokens are through the layers before this one.
        chunk: so many chunks are through this one too.
        states: hidden states of all tokens, [n, width], as they come to the next step of their chunk; where all are
            through all layers, none.
        parts: what each of those layers has made of the tokens, without what was held before them; of a layer with a
            window, at least the newest that it reaches. Of ``layer`` too, if a chunk is through it.
        handed: what layers have handed on to later ones for each chunk, where some do: see ``handed_on``.

    All of it lies in host memory.
    """

    layer: int
    chunk: int
    states: Tensor
    parts: Sequence[LayerPart]
    handed: Sequence[dict[str, Any]] = ()


def prefill(
    model: PreTrainedModel,
    layout: ModelLayout,
    tokens: Tensor,
    chunk: int,
    queries: int,
    layer_done: LayerDone,
    progress: Progress | None = None,
    states: HiddenStates | None = None,
    before: Beginning | None = None,
    whole: int | None = None,
    tokens_done: TokensDone | None = None,
) -> None:
    """Compute the KV of ``tokens`` (n,), layer by layer. At least one more token must follow them.

    Args:
        model: with our attention attached. layout: of that model.
        chunk: tokens per step through one layer.
        queries: how many of the newest queries to hand on.
        layer_done, progress, tokens_done: see ``Prefill.run``.
        states: keeps the hidden states between two layers; on the device, if there is none.
        before: what the tokens follow. whole: tokens of the text that all of this is read for, if there are more.
    """
    start = 0 if before is None else before.length
    stretch = Stretch(layout, tokens, start, whole or start + len(tokens))
    reading = Prefill(model, stretch, chunk, queries, states, before)
    try:
        reading.run(layer_done, progress, tokens_done)
    finally:
        reading.end()


class Prefill:
    """One prefill. To be followed by ``end`` in any case."""

    def __init__(
        self,
        model: PreTrainedModel,
        stretch: Stretch,
        chunk: int,
        queries: int,
        states: HiddenStates | None = None,
        before: Beginning | None = None,
    ) -> None:
        """The same as for ``prefill``."""
        count = len(stretch.tokens)
        self._model, self._stretch = model, stretch
        self._layers = layers_of(model.get_decoder())
        self._parts = [slice(start, min(start + chunk, count)) for start in range(0, count, chunk)]
        self._states = states or DeviceStates(chunk)
        self._view: LayerView | None = LayerView(count, queries, before)
        self._calls: list[list[Call]] = []
        self._done: list[AttentionPart | None] = []  # of each layer that was handed on, without keys and values
        self._at = 0, 0  # the next step: a layer, a chunk
        self._whole = False  # whether what there is is that of whole steps
        self._telling = False

    def run(
        self,
        layer_done: LayerDone,
        progress: Progress | None = None,
        tokens_done: TokensDone | None = None,
        halt: Halt | None = None,
    ) -> None:
        """All layers, or those that are missing.

        Args:
            layer_done: called once per layer, in order, with its number and what it has made of the text. The KV buffer
                is used again for the next layer: return the copies that are still reading it.
            progress: called with (steps done, steps in all).
            tokens_done: called for each chunk in the end, in order.
            halt: where an earlier one was stopped. Its layers are handed on anew.
        """
        with torch.no_grad():
            self._record(halt)
            if halt is not None:
                self._go_on(halt, layer_done)
            self._whole = True
            for index in range(self._at[0], len(self._layers)):
                self._read(self._layers[index], index, progress, tokens_done)
                self._hand_on(index, layer_done)

    def end(self) -> None:
        """Give back what it takes on the device."""
        self._view = None
        self._calls.clear()
        self._states.end()

    @property
    def layer(self) -> int:
        """All tokens are through the layers before this one."""
        return self._at[0]

    def was_stopped(self, error: BaseException) -> bool:
        """Whether ``error`` came from outside: an interruption, or whoever is told the progress. Else it is a fault."""
        return self._telling or not isinstance(error, Exception)

    def halt(self, filled: Filled) -> Halt | None:
        """Where it stands, before ``end`` or after the last layer; None where nothing of it can be gone on with."""
        (layer, chunk), states = self._at, None
        if not self._whole or not (layer or chunk):
            return None
        if layer < len(self._layers):
            states = self._states.kept()
            if states is None:
                return None
        parts = [filled(index, done) for index, done in enumerate(self._done[:layer])]
        if chunk:
            parts.append(self._view.halted())
        handed = [handed_on(calls) for calls in self._calls]
        none = torch.empty(0, 0, dtype=self._model.dtype) if states is None else states
        return Halt(layer, chunk, none, parts, handed if any(handed) else ())

    def _record(self, halt: Halt | None) -> None:
        """Run the base model once per chunk; its embeddings are the first hidden states."""
        for number, part in enumerate(self._parts):
            embedded, per_layer = record(self._model, self._stretch, part)
            if halt is None or halt.layer < len(self._layers):
                if number == 0:
                    self._states.begin(embedded, len(self._stretch.tokens))
                if halt is None:
                    self._states.put(number, embedded)
            self._calls.append(per_layer)

    def _go_on(self, halt: Halt, layer_done: LayerDone) -> None:
        """Come to where an earlier one was stopped."""
        device, last = self._model.device, halt.layer + 1 == len(self._layers)
        if halt.layer < len(self._layers):
            self._states.go_on(halt.states, halt.chunk, last)
        for calls, held in zip(self._calls, halt.handed, strict=False):
            for name, pair in held.items():
                handed_on(calls, make=True)[name] = tuple(tensor.to(device) for tensor in pair)
        for index, part in enumerate(halt.parts):
            self._view.begin(index)
            self._view.put_back(part, device)
            if index < halt.layer:
                self._hand_on(index, layer_done)
        self._view.settle()
        self._at = halt.layer, halt.chunk

    def _read(self, layer: nn.Module, index: int, progress: Progress | None, tokens_done: TokensDone | None) -> None:
        """All chunks that are missing through one layer."""
        view, states, last = self._view, self._states, index + 1 == len(self._layers)
        if self._at[1] == 0:
            view.begin(index)
        for number in range(self._at[1], len(self._parts)):
            call = self._calls[number][index]
            made = layer(states.take(number), *call.args, **{**call.kwargs, "triforce": view})
            self._whole = False  # until all that it has changed is of the same step
            states.put(number, made, keep=not last)
            if last and tokens_done is not None:
                first = self._stretch.start + self._parts[number].start
                tokens_done(range(first, first + made.shape[1]), made[0])
            view.settle()
            self._at = index, number + 1
            self._whole = True
            if progress:
                self._telling = True
                progress(index * len(self._parts) + number + 1, len(self._layers) * len(self._parts))
                self._telling = False

    def _hand_on(self, index: int, layer_done: LayerDone) -> None:
        part = self._view.part()
        self._view.leaving = layer_done(index, part) or self._view.leaving
        done = None
        if isinstance(part, AttentionPart):
            wanted = part.queries if part.params.window is None else part.queries[:, :0]
            # Copies: they may be views of all queries of a chunk.
            done = part._replace(kv=part.kv[:, :, :0].clone(), queries=wanted.clone())
        self._done[index:] = [done]
        self._at = index + 1, 0
