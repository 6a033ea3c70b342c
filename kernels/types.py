"""What the kernels take and hand on. Shapes use the letters that ``reference`` explains."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AttentionParams(NamedTuple):
    """How a model turns a query and a key into a score: scaling, sliding window in tokens, logit soft-capping.

    ``sinks`` [H], of any floating-point type: a learned score of each query head that takes its share of the softmax
    and has no value. It counts once for every query, at the end, and neither scaling nor soft-capping applies to it.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


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


class Convolution(NamedTuple):
    """What a short convolution of each of C channels takes: ``inputs`` [T, C], ``weight`` [C, W], ``bias`` [C].

    ``activation`` is "silu" or None.
    """

    inputs: Tensor
    weight: Tensor
    bias: Tensor | None = None
    activation: str | None = None


class DeltaTokens(NamedTuple):
    """T tokens as a gated delta rule takes them in, with Hk key heads and Hv value heads, a multiple of Hk.

    ``query``, ``key`` [T, Hk, Dk]; ``value`` [T, Hv, Dv]; ``gate`` float32 [T, Hv], the logarithm of what the state is
    multiplied with (never above 0); ``beta`` [T, Hv], how much of what the state says under a key is replaced.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    gate: Tensor
    beta: Tensor


class DeltaNodes(NamedTuple):
    """What one layer's delta rule keeps of N tokens of a tree that are not in its state yet. All float32.

    ``keys`` [Hk, N, Dk], normalised. ``updates`` [Hv, N, Dv]: what each token would write under its key. ``gates``
    [Hv, N]: its own; ``decays`` [Hv, N]: the sum of those from the root of the tree to the token.
    """

    keys: Tensor
    updates: Tensor
    gates: Tensor
    decays: Tensor


class NodeStep(NamedTuple):
    """How T new tokens of a tree find their ancestors among N rows of tokens that are not in the state yet.

    ``seen`` bool [T, N]: which rows are a token's ancestors, or it itself. ``places`` int64 [T]: the tokens' own rows,
    one after the other. ``sources`` int64 [T, W]: what their convolution reads, oldest first, as rows of the W - 1
    newest inputs of the text followed by those N.
    """

    seen: Tensor
    places: Tensor
    sources: Tensor
