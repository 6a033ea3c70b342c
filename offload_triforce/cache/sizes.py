"""What caches make room for, in tokens and bytes: plain arithmetic, for them and for planning alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offload_triforce.errors import InputError
from offload_triforce.scheduler.plan import TilePlan


def slot_bytes(chunk: int, head_dim: int, bits: int, itemsize: int) -> int:
    """Bytes of one slot of one layer and KV head; ``itemsize`` of the model's dtype."""
    if bits == 16:
        return 2 * chunk * head_dim * itemsize
    return 2 * chunk * head_dim * bits // 8 + 2 * head_dim + 2 * chunk * 2


def tail_capacity(plan: TilePlan, keep: int, block: int, news: int) -> int:
    """Tokens that a full cache's tail makes room for, per layer: what a commit brings, and what the next pass has
    pending. ``keep``: newest tokens that always stay there."""
    return plan.tile_tokens + keep + news + block


def window_room(windows: Sequence[int], context: int, block: int) -> int:
    """Tokens that a window cache makes room for, per layer, beside the drafts."""
    held = min(max(windows), context)
    return held + max(held // 4, block) + block  # a quarter more, so that moving to the front is rare


@dataclass(frozen=True)
class RetrievalShape:
    """How a budget is spent, in tokens: sink chunks, chosen chunks, recent window. Validated on construction.

    ``bits``: of a number in a chosen chunk, see ``make_store``.
    """

    budget: int
    chunk: int
    sink: int
    recent: int
    bits: int = 16

    def __post_init__(self) -> None:
        if self.sink % self.chunk:
            raise InputError(f"sink must be a multiple of the chunk of {self.chunk} tokens, not {self.sink}")
        if self.slots < 1:
            least = self.sink + self.recent + self.chunk
            raise InputError(
                f"budget {self.budget} leaves no room for a single chunk: sink {self.sink}, recent window "
                f"{self.recent} and one chunk of {self.chunk} need at least {least} tokens"
            )

    @property
    def slots(self) -> int:
        """Chunks to choose per KV head and layer."""
        return (self.budget - self.sink - self.recent) // self.chunk

    def recent_start(self, length: int) -> int:
        """Where the recent window of ``length`` tokens begins: at a chunk, or at 0 while there is no pool yet."""
        start = max(0, length - self.recent) // self.chunk * self.chunk
        return start if start > self.sink else 0

    def tail_needed(self, news: int) -> int:
        """Newest tokens that a full cache must have on the device, for ``sync`` to find the recent window there.

        ``news``: most tokens that one pass commits.
        """
        return self.recent + self.chunk + news

    def near(self, news: int, drafts: int) -> int:
        """Tokens to make room for beside the chosen chunks, per KV head and layer; ``drafts``: most draft tokens."""
        return self.sink + self.recent + self.chunk + news + drafts

    def chosen_bytes(self, head_dim: int, itemsize: int) -> int:
        """Bytes of all chosen chunks, per KV head and layer; ``itemsize`` of the model's dtype."""
        return self.slots * slot_bytes(self.chunk, head_dim, self.bits, itemsize)

    def held_bytes(self, head_dim: int, itemsize: int) -> int:
        """Bytes of all that is held of the text, per KV head and layer: the sink, the recent window with room for it to
        move by a chunk, and the chosen chunks. What draft tokens take does not grow with the text, and is not counted.
        """
        return _near_bytes(self.sink, self.recent, self.chunk, head_dim, itemsize) + self.chosen_bytes(
            head_dim, itemsize
        )

    def pool(self, length: int) -> range:
        """Chunk numbers to choose from: all between the sink and the recent window."""
        first = self.sink // self.chunk
        return range(first, max(first, self.recent_start(length) // self.chunk))


def equal_slots(
    reference: RetrievalShape, chunk: int, sink: int, recent: int, bits: int, head_dim: int, itemsize: int = 2
) -> int:
    """Chunks of another kind that are held in no more memory than ``reference`` takes; 0 if there is room for none.

    ``chunk``, ``sink``, ``recent`` and ``bits`` as of a shape; ``itemsize`` of the model's dtype.
    """
    room = reference.held_bytes(head_dim, itemsize) - _near_bytes(sink, recent, chunk, head_dim, itemsize)
    return max(0, room // slot_bytes(chunk, head_dim, bits, itemsize))


def _near_bytes(sink: int, recent: int, chunk: int, head_dim: int, itemsize: int) -> int:
    return (sink + recent + chunk) * 2 * head_dim * itemsize


@dataclass(frozen=True)
class RecurrentShape:
    """One recurrent layer: a gated delta rule behind a short convolution.

    Attributes:
        key_heads, value_heads: of the delta rule. key_dim, value_dim: of each head.
        channels, taps: of the convolution.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    channels: int
    taps: int

    def state_bytes(self, itemsize: int) -> int:
        """Bytes of what is committed: the state in float32, and each level's newest inputs of the convolution."""
        state = 4 * self.value_heads * self.key_dim * self.value_dim
        return state + 2 * (self.taps - 1) * self.channels * itemsize

    def checkpoint_bytes(self, itemsize: int) -> int:
        """Bytes of a copy of the state and the convolution's newest inputs."""
        return self.state_bytes(itemsize) - (self.taps - 1) * self.channels * itemsize

    def node_bytes(self, itemsize: int) -> int:
        """Bytes of one token that is not in the state yet: key, update and two sums in float32, and its input."""
        return 4 * (self.key_heads * self.key_dim + self.value_heads * (self.value_dim + 2)) + self.channels * itemsize
