"""What the kernels take and hand on. Shapes use the letters that ``reference`` explains."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AttentionParams(NamedTuple):
    """How a model turns a query and a key into a score: scaling, sliding window in tokens, logit soft-capping."""

    scaling: float
    window: int | None = None
    softcap: float | None = None


class TreeMask(NamedTuple):
    """What is special about the newest of n keys: they are the queries' own tokens, which do not all see each other.

    ``mask`` (bool [T, M]) tells which of the last M keys each query sees; keys before them are seen by all, as far
    as a window reaches. ``positions`` (int64 [T]), for windows over a tree, are the queries' places on the axis of
    the keys; without it, query t is the key n - T + t. ``length`` (int64, one element, on the device) is n for a
    buffer that is longer than its content: what lies behind does not exist.
    """

    mask: Tensor
    positions: Tensor | None = None
    length: Tensor | None = None


class PartialAttention(NamedTuple):
    """Softmax attention over the keys seen so far, carried from tile to tile (online softmax).

    ``maximum`` [K, G*T] is the largest score, ``total`` [K, G*T] the sum of exp(score - maximum) and
    ``weighted`` [K, G*T, D] the same sum weighted with the values. All float32.
    """

    maximum: Tensor
    total: Tensor
    weighted: Tensor


class ChunkSelection(NamedTuple):
    """The chunks that each of K KV heads holds in its k slots, and how much it wants them.

    ``scores`` [K, k] float32, -inf for an empty slot. ``chunks`` [K, k] int64: their numbers, -1 for an empty
    slot. ``held`` [K, all chunks + 1] bool: the same as a set; its last column is nobody's, and may hold anything.
    """

    scores: Tensor
    chunks: Tensor
    held: Tensor


class CodedChunks(NamedTuple):
    """Chunks of one layer in slots.

    Attributes:
        key_codes, value_codes: uint8 [K, k, chunk, D * bits / 8].
        key_low, key_step: uint8 [K, k, D]. The lowest key of a chunk's channel is floor + spread * low / 255, and the
            distance of its codes is spread / levels * step / 255, with levels = 2^bits - 1.
        value_low, value_step: float16 [K, k, chunk].
        floor, spread: float32 [K, D].
    """

    key_codes: Tensor
    value_codes: Tensor
    key_low: Tensor
    key_step: Tensor
    value_low: Tensor
    value_step: Tensor
    floor: Tensor
    spread: Tensor

    @property
    def bits(self) -> int:
        """Bits of a code: 4 or 8."""
        return 8 * self.key_codes.shape[-1] // self.floor.shape[-1]

    @property
    def chunk(self) -> int:
        """Tokens per chunk."""
        return self.key_codes.shape[2]
