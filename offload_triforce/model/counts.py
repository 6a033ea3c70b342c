"""The weights of a model as plain numbers: how many there are in which part, and what bytes they take, packed or not.

Of the models in ``model.names`` they are written down, so that planning for those needs neither torch nor transformers;
``model.weights`` counts those of all others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from offload_triforce.errors import InputError

QUANTIZATIONS = ("nf4", "int8")
# bitsandbytes without double quantisation, as the loader asks for: one float32 scale per block of 64 weights.
NF4_BLOCK = 64


def check_quantization(quantize: str | None) -> None:
    """None, or one of QUANTIZATIONS.

    Raises:
        InputError: another word.
    """
    if quantize is not None and quantize not in QUANTIZATIONS:
        raise InputError(f"unknown quantisation {quantize!r}; use {' or '.join(QUANTIZATIONS)}")


@dataclass(frozen=True)
class Weights:
    """Bytes of weights on the device, and what a step through one decoder layer (a mean one) reads and computes.

    Attributes:
        parameters: of the whole model. total: bytes of all.
        layer: bytes of a layer that every token needs. layer_parameters: the same, counted.
        unpacked: bytes that nf4 weights of a layer are written out to and read from again, at more than one token.
        experts: bytes of all experts of a layer. expert_parameters: the same, counted.
        expert_share: share of the experts that one token chooses.
        head: bytes of the output embedding. head_parameters: the same, counted.
        largest: bytes of the largest weight that is packed on loading, before that.
    """

    parameters: int
    total: int
    layer: float
    layer_parameters: float
    unpacked: float
    experts: float
    expert_parameters: float
    expert_share: float
    head: int
    head_parameters: int
    largest: int = 0


class Part(NamedTuple):
    """Parameters of one part of a model.

    Attributes:
        plain: of those that are kept as they are.
        packed: of linear layers' weights, which a quantisation packs. rows: of those weights; blocks: of NF4_BLOCK.
        extra: bytes of parameters in another dtype than the model's, beyond (or, negative, below) what they would take.
    """

    plain: int = 0
    packed: int = 0
    rows: int = 0
    blocks: int = 0
    extra: int = 0

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.plain + self.packed

    def size(self, itemsize: int, quantize: str | None) -> int:
        """Bytes; ``itemsize`` of the model's dtype."""
        plain = self.plain * itemsize + self.extra
        if quantize == "nf4":
            return plain + (self.packed + 1) // 2 + 4 * self.blocks
        if quantize == "int8":
            return plain + self.packed + 4 * self.rows  # one float32 scale per row
        return plain + self.packed * itemsize

    def plus(self, other: Part) -> Part:
        """Both together."""
        return Part(*(a + b for a, b in zip(self, other, strict=True)))


NOTHING = Part()


@dataclass(frozen=True)
class Counts:
    """What is in a model, whatever the dtype.

    Attributes:
        layers: of the decoder. inside: all layers' parameters but the experts. experts: all layers' experts.
        outside: embeddings, the last norm, other towers. head: parameters of the output embedding.
        largest: parameters of the largest weight that a quantisation packs.
        expert_share: share of the experts that one token chooses.
    """

    layers: int
    inside: Part
    outside: Part
    head: int
    largest: int
    experts: Part = NOTHING
    expert_share: float = 1.0

    def weights(self, itemsize: int, quantize: str | None) -> Weights:
        """The same in bytes. ``itemsize``: of the dtype of what is not packed."""
        parts = (self.inside, self.experts, self.outside)
        unpacked = 2 * itemsize * (self.inside.packed + self.experts.packed) if quantize == "nf4" else 0
        return Weights(
            parameters=sum(part.parameters for part in parts),
            total=sum(part.size(itemsize, quantize) for part in parts),
            layer=self.inside.size(itemsize, quantize) / self.layers,
            layer_parameters=self.inside.parameters / self.layers,
            unpacked=unpacked / self.layers,
            experts=self.experts.size(itemsize, quantize) / self.layers,
            expert_parameters=self.experts.parameters / self.layers,
            expert_share=self.expert_share,
            head=self.head * itemsize,
            head_parameters=self.head,
            largest=self.largest * itemsize if quantize else 0,
        )
