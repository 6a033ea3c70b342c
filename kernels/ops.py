"""The operations of the hot path, by the best means at hand: Triton on CUDA, else torch or numba.

Callers import this module alone. What each operation computes is said by its eager twin in ``reference``.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType

import torch
from torch import Tensor

from offload_triforce.kernels import cpu, reference, reference_codec, reference_delta, reference_wire
from offload_triforce.kernels.cpu import CHOICE
from offload_triforce.kernels.reference import causal_mask, pack_queries, put_chunks
from offload_triforce.kernels.reference_delta import node_step
from offload_triforce.kernels.types import (
    AttentionParams,
    ChunkSelection,
    CodedChunks,
    Convolution,
    DeltaNodes,
    DeltaTokens,
    NodeStep,
    TreeMask,
)
from offload_triforce.kernels.wire_format import WireFormat

try:
    from offload_triforce.kernels import (
        attention_state,
        chunk_selection,
        delta_rule,
        kv_codec,
        packed_attention,
        tile_choice,
        trial,
        verify_attention,
        wire_codec,
    )
    from offload_triforce.kernels import chunk_scores as triton_scores
    from offload_triforce.kernels import fetch as triton_fetch
    from offload_triforce.kernels import int8_product as triton_product
except ImportError:  # no Triton: torch alone
    verify_attention = None

__all__ = [
    "AttentionParams",
    "ChunkSelection",
    "CodedChunks",
    "Convolution",
    "DeltaNodes",
    "DeltaTokens",
    "NodeStep",
    "RunningAttention",
    "RunningChoice",
    "TreeMask",
    "WireFormat",
    "causal_mask",
    "chunk_scores",
    "commit_path",
    "decode_keys",
    "delta_tree",
    "fetch",
    "int8_product",
    "node_step",
    "own_tokens",
    "pack_queries",
    "prefill_attention",
    "put_chunks",
    "take_chunks",
    "tree_convolution",
    "what_stops_triton",
    "wire_decode",
    "wire_encode",
]


def uses_triton(tensor: Tensor) -> bool:
    """Whether operations on this tensor run as Triton kernels.

    On the CPU they can, through Triton's interpreter, for tests: set OFFLOAD_TRIFORCE_KERNELS=triton and
    TRITON_INTERPRET=1. OFFLOAD_TRIFORCE_KERNELS=torch forbids them everywhere, to tell whether one is at fault.
    """
    return _allowed() and (tensor.is_cuda or os.environ.get(CHOICE) == "triton")


def _allowed() -> bool:
    return verify_attention is not None and os.environ.get(CHOICE) != "torch"


def what_stops_triton() -> trial.Obstacle | None:
    """Why Triton's kernels do not run on this machine's GPU, and what to do about it; None if they do.

    One tiny kernel is compiled, loaded and launched: the first needs a C compiler and Python's headers, the second a
    driver that is not too old. Where torch runs instead, nothing stands in the way.
    """
    return trial.find_obstacle() if _allowed() else None


def _torch_functions(tensor: Tensor) -> ModuleType:
    """Where Triton does not serve: the eager twins, or the CPU's own versions of them."""
    return reference if tensor.is_cuda else cpu


@functools.lru_cache(maxsize=64)
def own_tokens(tokens: int, device: torch.device) -> TreeMask:
    """The queries' own tokens are the newest keys, each seen by itself and those after it. Made once per length."""
    return TreeMask(causal_mask(tokens, tokens, device=device))


class RunningAttention:
    """Attention of one block of queries over keys that come part by part. One object serves layer after layer."""

    def __init__(self) -> None:
        self.packed = torch.empty(0)
        self._heads = 0
        self._params = AttentionParams(1.0)
        self._buffers: tuple[Tensor, ...] = ()
        self._tiles = None if verify_attention is None else verify_attention.TileUpdates()

    def start(self, query: Tensor, kv_heads: int, params: AttentionParams) -> None:
        """Begin with T queries, [H, T, D]. What was computed before is over."""
        self.packed = pack_queries(query, kv_heads)
        self._heads, self._params = query.shape[0], params
        self._triton = uses_triton(query) and verify_attention.serves(query.shape[2])
        if self._triton:
            self._buffers = attention_state.state_buffers(self._buffers, self.packed)
            self._state = attention_state.attention_start(self._buffers, self.packed)
            self._tiles.start(self._state, self.packed, params)
        else:
            self._state = _torch_functions(query).attention_start(self.packed)

    def update(self, key: Tensor, value: Tensor, tree_mask: TreeMask | None = None) -> None:
        """Take keys and values in, [K, n, D] each; ``tree_mask`` where the queries' own tokens are among them."""
        if self._triton and self._state.started and tree_mask is None:
            self._tiles.update(key, value)
            return
        functions = verify_attention if self._triton else _torch_functions(key)
        self._state = functions.attention_update(self._state, self.packed, key, value, self._params, tree_mask)

    def update_tile(self, kv: Tensor) -> None:
        """Take a tile in, [2, K, n, D], which all queries see."""
        if self._triton and self._state.started:
            self._tiles.update_tile(kv)
        else:
            self.update(kv[0], kv[1])

    def update_first(self, key: Tensor, value: Tensor, tokens: Tensor) -> None:
        """Take the first ``tokens`` (int64 [1], on the device) keys and values in, which all queries see."""
        self.update(key, value, TreeMask(_all_see(self.packed.device), length=tokens))

    def update_coded(self, coded: CodedChunks, slots: int | None = None, tokens: Tensor | None = None) -> None:
        """Take packed chunks in, which all queries see: those of the first ``slots``, or the first ``tokens``.

        ``tokens`` (int64 [1]) is told by the device, for steps of fixed work.
        """
        if self._triton and packed_attention.serves(self.packed.shape[2]):
            self._state = packed_attention.attention_update(
                self._state, self.packed, coded, self._params, slots, tokens
            )
            return
        functions = reference_codec if coded.floor.is_cuda else cpu
        key, value = functions.decode_chunks(coded, coded.key_codes.shape[1] if slots is None else slots)
        dtype = self.packed.dtype
        if tokens is None:
            self.update(key.to(dtype), value.to(dtype))
        else:
            self.update_first(key.to(dtype), value.to(dtype), tokens)

    def logsumexp(self) -> Tensor:
        """Log-sum-exp of the keys' scores so far, without learned sinks, per packed query: float32 [K, G*T]."""
        return (attention_state if self._triton else reference).attention_logsumexp(self._state)

    def finish(self) -> Tensor:
        """The attention output, [H, T, D] in the queries' dtype. Learned sinks join the softmax here, once."""
        functions = attention_state if self._triton else reference
        return functions.attention_finish(self._state, self._heads, self.packed.dtype, self._params.sinks)


@functools.lru_cache(maxsize=8)
def _all_see(device: torch.device) -> Tensor:
    """The mask of one key that one query sees."""
    return torch.ones(1, 1, dtype=torch.bool, device=device)


def prefill_attention(query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
    """See ``reference.prefill_attention``.

    torch's fused kernels know no soft-capping, no learned sinks, and no groups in float32.
    """
    grouped = query.dtype == torch.float32 and query.shape[0] != key.shape[0]
    fused = params.softcap is None and params.sinks is None and not grouped
    if fused or not uses_triton(query):
        return _torch_functions(query).prefill_attention(query, key, value, params)
    attention, tokens = RunningAttention(), query.shape[1]
    attention.start(query, key.shape[0], params)
    attention.update(key, value, own_tokens(tokens, query.device))
    return attention.finish()


def chunk_scores(
    packed: Tensor, key: Tensor, chunk: int, scaling: float, baseline: Tensor, held: Tensor | None = None
) -> Tensor:
    """See ``reference.chunk_scores``."""
    functions = triton_scores if uses_triton(key) else _torch_functions(key)
    return functions.chunk_scores(packed, key, chunk, scaling, baseline, held)


def take_chunks(
    selection: ChunkSelection, offered: Tensor, first: int, kv: Tensor, slots: Tensor | CodedChunks
) -> None:
    """See ``reference.take_chunks``."""
    functions = chunk_selection if uses_triton(kv) else _torch_functions(kv)
    functions.take_chunks(selection, offered, first, kv, slots)


class RunningChoice:
    """A layer's chunks, chosen while its tiles pass by. One object serves layer after layer."""

    def __init__(self) -> None:
        self._tiles = None if verify_attention is None else tile_choice.TileChoice()

    def start(
        self,
        packed: Tensor,
        baseline: Tensor,
        scaling: float,
        chunk: int,
        selection: ChunkSelection,
        slots: Tensor | CodedChunks,
    ) -> None:
        """Begin with a layer. Arguments are those of ``chunk_scores`` and ``take_chunks``."""
        self._arguments = (packed, baseline, scaling, chunk, selection, slots)
        self._triton = uses_triton(packed)
        if self._triton:
            self._tiles.start(*self._arguments)

    def see(self, first: int, kv: Tensor) -> None:
        """Consider the chunks ``first``, first + 1, ... of a tile, [2, K, C*chunk, D]."""
        if self._triton:
            self._tiles.see(first, kv)
            return
        packed, baseline, scaling, chunk, selection, slots = self._arguments
        held = selection.held[:, first : first + kv.shape[2] // chunk]
        functions = _torch_functions(kv)
        offered = functions.chunk_scores(packed, kv[0], chunk, scaling, baseline, held)
        functions.take_chunks(selection, offered, first, kv, slots)


def decode_keys(coded: CodedChunks, slots: int, dtype: torch.dtype) -> Tensor:
    """See ``reference_codec.decode_keys``; in ``dtype``."""
    if uses_triton(coded.floor):
        return kv_codec.decode_keys(coded, slots, dtype)
    return reference_codec.decode_keys(coded, slots).to(dtype)


def tree_convolution(convolution: Convolution, held: Tensor, step: NodeStep) -> Tensor:
    """See ``reference_delta.tree_convolution``."""
    functions = delta_rule if uses_triton(held) else reference_delta
    return functions.tree_convolution(convolution, held, step)


def delta_tree(tokens: DeltaTokens, state: Tensor, nodes: DeltaNodes, step: NodeStep) -> Tensor:
    """See ``reference_delta.delta_tree``."""
    functions = delta_rule if uses_triton(state) else reference_delta
    return functions.delta_tree(tokens, state, nodes, step)


def commit_path(state: Tensor, keys: Tensor, updates: Tensor, decays: Tensor) -> None:
    """See ``reference_delta.commit_path``."""
    functions = delta_rule if uses_triton(state) else reference_delta
    functions.commit_path(state, keys, updates, decays)


def fetch(target: Tensor, source: Tensor) -> None:
    """Fill a small tensor from one in pinned host memory of the same shape and dtype, both contiguous.

    The device reads it by itself, behind no copy. The source has to stay as it is until the device has been there.
    """
    # Where Triton cannot run, that is refused in words, and only once a model has been looked at.
    if uses_triton(target) and (not target.is_cuda or _triton_runs()):
        triton_fetch.fetch(target, source)
    else:
        target.copy_(source, non_blocking=True)


@functools.cache
def _triton_runs() -> bool:
    return what_stops_triton() is None


def int8_product(hidden: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """See ``reference.int8_product``."""
    functions = triton_product if uses_triton(hidden) else reference
    return functions.int8_product(hidden, codes, scale)


def wire_encode(kv: Tensor, coded: Tensor, format: WireFormat) -> None:
    """See ``reference_wire.wire_encode``."""
    _wire_functions(kv).wire_encode(kv, coded, format)


def wire_decode(coded: Tensor, kv: Tensor, format: WireFormat) -> None:
    """See ``reference_wire.wire_decode``."""
    _wire_functions(kv).wire_decode(coded, kv, format)


def _wire_functions(kv: Tensor) -> ModuleType:
    if uses_triton(kv):
        return wire_codec
    numba = None if kv.is_cuda else cpu.loops("cpu_wire")
    return reference_wire if numba is None else numba
