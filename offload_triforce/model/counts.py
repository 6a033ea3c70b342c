"""The weights of a model as plain numbers: how many there are in which part, and what bytes they take, packed or not.

Of the models in ``model.names`` they are written down, so that planning for those needs neither torch nor transformers;
``model.weights`` counts those of all others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from offload_triforce.errors import InputError

QUANTIZATIONS = ("nf4", "int8")
HEAD_QUANTIZATIONS = ("int8",)
# What the loader asks bitsandbytes for, "double quantisation": the scale of each block of 64 weights is a code of 8
# bits, and each 256 of these codes share a float32. That is 4.127 bits per weight, where float32 scales would make it
# 4.5. Each matrix has its two tables of float32 values (of weights and of scales) and the scales' mean beside it.
NF4_BLOCK, NF4_SCALES = 64, 256
NF4_TABLES = 4 * (16 + 256 + 1)


def check_quantization(quantize: str | None) -> None:
    """None, or one of QUANTIZATIONS.

    Raises:
        InputError: another word.
    """
    if quantize is not None and quantize not in QUANTIZATIONS:
        raise InputError(f"unknown quantisation {quantize!r}; use {' or '.join(QUANTIZATIONS)}")


def check_head_quantization(quantize_head: str | None, tied: bool = False) -> None:
    """None, or one of HEAD_QUANTIZATIONS for an output embedding whose weights are its own (not ``tied``).

    Raises:
        InputError: another word, or weights that stay there anyway, as the input embedding.
    """
    if quantize_head is not None and quantize_head not in HEAD_QUANTIZATIONS:
        known = " or ".join(HEAD_QUANTIZATIONS)
        raise InputError(f"unknown quantisation {quantize_head!r} of the output head; use {known}")
    if quantize_head is not None and tied:
        raise InputError(
            "this model's output head is its input embedding too, which keeps its dtype: packing the head would take "
            "more memory and not less; leave --quantize-head out"
        )


def packing_options(quantize: str | None, quantize_head: str | None) -> str:
    """The options of ``generate`` that pack the weights so."""
    options = {"--quantize": quantize, "--quantize-head": quantize_head}
    return " ".join(f"{name} {value}" for name, value in options.items() if value)


def check_packed_once(name: str, method: str, quantize: str | None, quantize_head: str | None) -> None:
    """Refuse to pack weights again that are packed by a ``method`` in their files. ``name``: of the model.

    Raises:
        InputError: they are to be.
    """
    if asked := packing_options(quantize, quantize_head):
        raise InputError(f"the weights of {name} are packed already ({method}); leave {asked} out")


def nf4_bytes(weights: int, blocks: int) -> int:
    """Bytes of so many weights in so many blocks, without the tables of each matrix."""
    return (weights + 1) // 2 + blocks + 4 * -(-blocks // NF4_SCALES)


class Matrix(NamedTuple):
    """Weights of linear layers of one shape. ``number``: in all decoder layers."""

    rows: int
    columns: int
    number: int


@dataclass(frozen=True)
class Weights:
    """Bytes of weights on the device, and what a step through one decoder layer (a mean one) reads and computes.

    Attributes:
        parameters: of the whole model. total: bytes of all.
        layer: bytes of a layer that every token needs. layer_parameters: the same, counted.
        unpacked: the decoder layers' nf4 weights, which may be written out in 16 bits for a product (see
            ``planner.unpacking``); none under other quantisations. itemsize: of what they are written out in.
        experts: bytes of all experts of a layer. expert_parameters: the same, counted.
        expert_share: share of the experts that one token chooses.
        head: bytes of the output embedding. head_parameters: the same, counted.
        largest: bytes of the largest weight that is packed on the device on loading, before that. The output embedding
            is packed bit by bit, from host memory.
    """

    parameters: int
    total: int
    layer: float
    layer_parameters: float
    unpacked: tuple[Matrix, ...]
    itemsize: int
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
            return plain + nf4_bytes(self.packed, self.blocks)
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
        matrices: the weights of ``inside`` that a quantisation packs, by shape.
        head_rows: of the output embedding. tied: whether its weights are the input embedding's.
    """

    layers: int
    inside: Part
    outside: Part
    head: int
    largest: int
    experts: Part = NOTHING
    expert_share: float = 1.0
    matrices: tuple[Matrix, ...] = ()
    head_rows: int = 0
    tied: bool = False

    def weights(self, itemsize: int, quantize: str | None, quantize_head: str | None = None) -> Weights:
        """The same in bytes. ``itemsize``: of the dtype of what is not packed."""
        parts = (self.inside, self.experts, self.outside)
        total, head = sum(part.size(itemsize, quantize) for part in parts), self.head * itemsize
        if quantize_head:  # one float32 scale per row
            packed = self.head + 4 * self.head_rows
            total, head = total - head + packed, packed
        tables = NF4_TABLES * sum(number for *_, number in self.matrices) if quantize == "nf4" else 0
        return Weights(
            parameters=sum(part.parameters for part in parts),
            total=total + tables,
            layer=(self.inside.size(itemsize, quantize) + tables) / self.layers,
            layer_parameters=self.inside.parameters / self.layers,
            unpacked=self.matrices if quantize == "nf4" else (),
            itemsize=itemsize,
            experts=self.experts.size(itemsize, quantize) / self.layers,
            expert_parameters=self.experts.parameters / self.layers,
            expert_share=self.expert_share,
            head=head,
            head_parameters=self.head,
            largest=self.largest * itemsize if quantize else 0,
        )
