"""The cache of recurrent layers: one state of the text, and of each draft token only what it would change in it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from offload_triforce.cache.buffer import check_kept, move_together
from offload_triforce.cache.layer import Snapshot
from offload_triforce.cache.sizes import RecurrentShape
from offload_triforce.kernels import ops


class PendingNodes:
    """Tokens that one level has read and that are not in the state yet, for a stack of L layers.

    They are a tree, or a path of one: what ``select`` keeps must hang together, below the first of them. Rows that
    hold no token are zero. Before the rows of ``inputs`` lie the newest inputs of the text, oldest first: a tree's
    first tokens are convolved with those.
    """

    def __init__(self, shape: RecurrentShape, capacity: int, dtype: torch.dtype, state: Tensor) -> None:
        """``capacity``: most tokens. ``dtype``: of the model. ``state``: the text's, float32 [L, Hv, Dk, Dv]."""
        self.shape, self.capacity, self.length, self.state = shape, capacity, 0, state
        layers, device = len(state), state.device
        where = {"dtype": torch.float32, "device": device}
        keys, values = shape.key_heads, shape.value_heads
        self.inputs = torch.zeros(layers, shape.taps - 1 + capacity, shape.channels, dtype=dtype, device=device)
        self.keys = torch.zeros(layers, keys, capacity, shape.key_dim, **where)
        self.updates = torch.zeros(layers, values, capacity, shape.value_dim, **where)
        self.gates, self.decays = torch.zeros(2, layers, values, capacity, **where)

    @property
    def tail(self) -> Tensor:
        """The newest inputs of the text, [L, W - 1, C] (a view)."""
        return self.inputs[:, : self.shape.taps - 1]

    def step(self, mask: Tensor) -> ops.NodeStep:
        """How T new tokens, which follow those held, see them and each other. ``mask``: bool [T, length + T].

        Raises:
            IndexError: they do not fit.
        """
        tokens, end = mask.shape
        self.check_room(tokens)
        return ops.node_step(mask, end, self.shape.taps, torch.arange(end - tokens, end, device=mask.device))

    def static_step(self, mask: Tensor, places: Tensor) -> ops.NodeStep:
        """The same in a step of fixed work, over all rows.

        ``mask`` bool [T, M]: which of the newest M tokens, its own last, each new one sees; those before are its
        ancestors. ``places`` int64 [T], their rows, on the device.
        """
        newest = mask.shape[1]
        columns = torch.arange(self.capacity, device=mask.device) - (places[-1] + 1 - newest)
        seen = (columns < 0) | mask[:, columns.clamp(0, newest - 1)]
        return ops.node_step(seen & (columns < newest), self.capacity, self.shape.taps, places)

    def check_room(self, tokens: int) -> None:
        """So many more have to fit.

        Raises:
            IndexError: they do not.
        """
        if self.length + tokens > self.capacity:
            raise IndexError(f"{self.length + tokens} tokens do not fit a buffer of {self.capacity}")

    def end_step(self, tokens: int) -> None:
        """The step is through all layers: its tokens are held."""
        self.length += tokens

    def select(self, kept: Sequence[int]) -> None:
        """Keep these of the tokens (their numbers, ascending), moved together, and drop the others.

        Ancestors of what is kept may go only if they come into the state.

        Raises:
            IndexError: not such numbers.
        """
        check_kept(kept, self.length)
        count, before = len(kept), self.length
        self.length = count
        if count and kept[0]:  # the state will have gone as far as the first one's parent
            gone = self.decays[..., kept[0]] - self.gates[..., kept[0]]
            self.decays[..., :before] -= gone[..., None]
        move_together(kept, *self._parts(), dim=2)
        for part in self._parts():
            part[:, :, count:before] = 0

    def clear(self) -> None:
        """Forget all tokens. What is known of the text stays."""
        self.select([])

    def _parts(self) -> list[Tensor]:
        """All that is kept of tokens, with their number as the third dimension."""
        return [self.inputs[:, None, self.shape.taps - 1 :], self.keys, self.updates, self.gates, self.decays]


class NodeView:
    """One step over ``nodes``, as recurrent layers see it. They do not say which they are, so it counts them.

    Attributes:
        nodes: where the step's tokens go.
    """

    def __init__(self, nodes: PendingNodes) -> None:
        self.nodes = nodes
        self._step: ops.NodeStep | None = None
        self._layer = 0

    def begin(self, step: ops.NodeStep) -> None:
        """The next step begins, with the first layer."""
        self._step, self._layer = step, 0

    def convolve(self, convolution: ops.Convolution) -> Tensor:
        """The next layer's convolution of the step's T tokens: [T, C]."""
        return ops.tree_convolution(convolution, self.nodes.inputs[self._layer], self._step)

    def recur(self, tokens: ops.DeltaTokens) -> Tensor:
        """What the step's T tokens read from that layer's state: [T, Hv, Dv]."""
        nodes, layer, rows = self.nodes, self._layer, self._step.seen.shape[1]
        self._layer = (layer + 1) % len(nodes.state)  # a step may be run twice, to be compared
        held = (part[layer, :, :rows] for part in (nodes.keys, nodes.updates, nodes.gates, nodes.decays))
        return ops.delta_tree(tokens, nodes.state[layer], ops.DeltaNodes(*held), self._step)


class RecurrentCache:
    """What recurrent layers remember of the text: a state [L, Hv, Dk, Dv] in float32, and the convolution's tail.

    Draft tokens never reach it: the target's are ``nodes`` and the retrieval level's are ``drafts``, until ``commit``
    takes the accepted path of the target's into the state. Both levels read the same state.
    """

    def __init__(
        self,
        layers: int,
        shape: RecurrentShape,
        block: int,
        drafts: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """``block``: most tokens pending at once. ``drafts``: the same of the retrieval level."""
        self.shape = shape
        size = layers, shape.value_heads, shape.key_dim, shape.value_dim
        self.state = torch.zeros(size, dtype=torch.float32, device=device)
        self.nodes = PendingNodes(shape, block, dtype, self.state)
        self.drafts = PendingNodes(shape, drafts, dtype, self.state)

    @property
    def pending(self) -> int:
        """Tokens that wait for a verdict."""
        return self.nodes.length

    def fill(self, layer: int, state: Tensor, tail: Tensor) -> None:
        """What one layer makes of a whole prompt, on an empty cache: ``state`` [Hv, Dk, Dv], ``tail`` [W - 1, C]."""
        self.state[layer] = state
        for nodes in (self.nodes, self.drafts):
            nodes.tail[layer] = tail

    def load(self, layer: int) -> tuple[Tensor, Tensor]:
        """One layer's state [Hv, Dk, Dv] and tail [W - 1, C], to read on from."""
        return self.state[layer].clone(), self.nodes.tail[layer].clone()

    def end_step(self, tokens: int) -> None:
        """The step is through all layers: its tokens are pending."""
        self.nodes.end_step(tokens)

    def select(self, kept: Sequence[int]) -> None:
        """See ``CacheLayers``: what is kept is a path from the root."""
        self.nodes.select(kept)

    def commit(self, tokens: int) -> None:
        """Take the first ``tokens`` pending tokens, a path, into the state, and drop the others."""
        self.settle(tokens)
        self.nodes.clear()

    def settle(self, tokens: int) -> None:
        """Take the first ``tokens`` pending tokens, a path, into the state; the others hang below it, and stay."""
        nodes = self.nodes
        if not 0 <= tokens <= nodes.length:
            raise IndexError(f"cannot accept {tokens} of {nodes.length} pending tokens")
        if not tokens:
            return
        parts = (part[:, :, :tokens] for part in (nodes.keys, nodes.updates, nodes.decays))
        ops.commit_path(self.state, *parts)
        tail = nodes.inputs[:, tokens : tokens + self.shape.taps - 1].clone()
        nodes.select(range(tokens, nodes.length))
        nodes.tail.copy_(tail)
        self.drafts.tail.copy_(tail)

    def reset(self) -> None:
        """Forget everything."""
        self.state.zero_()
        for nodes in (self.nodes, self.drafts):
            nodes.clear()
            nodes.tail.zero_()

    def snapshot(self) -> dict[str, Tensor]:
        """See ``CacheLayers``."""
        parts = {"state": self.state, "tail": self.nodes.tail}
        return {name: part.to("cpu", copy=True) for name, part in parts.items()}

    def restore(self, snapshot: Snapshot) -> None:
        """See ``CacheLayers``. What is drafted follows another text, and goes."""
        self.state.copy_(snapshot["state"])
        for nodes in (self.nodes, self.drafts):
            nodes.clear()
            nodes.tail.copy_(snapshot["tail"])
