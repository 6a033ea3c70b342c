"""A text that was read once, to begin any number of sessions with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from offload_triforce.model.adapter import attached
from offload_triforce.model.layer_view import AttentionPart, LayerPart
from offload_triforce.model.layout import ModelLayout
from offload_triforce.model.prefill import Progress, prefill
from offload_triforce.runtime.runtime import PREFILL_QUERIES
from offload_triforce.scheduler.device import on


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
