"""The CPU's own versions of some operations, where there is something faster than the eager twin.

Measured on one thread of a busy machine, CPU time, 3 KV heads, D 64, fp32 unless said otherwise, eager twin / here:

- attention of 39 packed rows over tiles of 512 and 4096 tokens: 332 / 247 and 2815 / 1649 microseconds (torch's fused
  kernel; compiled loops were no faster for 3 rows, and many times slower for 39).
- attention of a chunk of 1,024 tokens behind 1,024, 3,072 and 5,120 others, 9 heads, 2 threads: 23.1 / 18.3,
  47.4 / 41.0 and 67.3 / 60.8 milliseconds (the triangle apart: torch's fused kernel knows none at the lower right).
- selection: 326 / 84 where no chunk enters, as with most tiles once a choice has settled; else 820 / 460 (compiled).
- unpacking 120 chunks of 4 bits: 988 / 378 (compiled).
- chunk scores of 3 rows, 768 chunks, bf16 and fp16: 2588 / 1398 and 3203 / 1601 (compiled); in fp32 torch takes half
  as long as the compiled loop, and stays.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

from offload_triforce.kernels import reference, reference_codec
from offload_triforce.kernels.reference import (
    attention_finish,
    attention_logsumexp,
    attention_start,
    pack_queries,
)
from offload_triforce.kernels.types import AttentionParams, ChunkSelection, CodedChunks, PartialAttention, TreeMask

__all__ = [
    "attention_finish",
    "attention_logsumexp",
    "attention_start",
    "attention_update",
    "chunk_scores",
    "decode_chunks",
    "prefill_attention",
    "take_chunks",
]

CHOICE = "OFFLOAD_TRIFORCE_KERNELS"


def loops(name: str) -> ModuleType | None:
    """A module of loops that numba compiles; None where it is not installed, or by OFFLOAD_TRIFORCE_KERNELS=torch."""
    return None if os.environ.get(CHOICE) == "torch" else _import_loops(name)


@functools.cache
def _import_loops(name: str) -> ModuleType | None:
    # Imported when first needed: that takes a third of a second, which nobody on a GPU has to wait for.
    try:
        return importlib.import_module(f"offload_triforce.kernels.{name}")
    except ImportError:
        return None


def attention_update(
    state: PartialAttention,
    packed: Tensor,
    key: Tensor,
    value: Tensor,
    params: AttentionParams,
    tree_mask: TreeMask | None = None,
) -> PartialAttention:
    """See ``reference.attention_update``. Tiles that all queries see go through torch's fused CPU attention.

    It returns each query's normalised output and log-sum-exp: the state of a softmax with all mass at one score.
    In half precision it would round every tile's output, so the eager twin, which rounds once, stays.
    """
    if tree_mask is not None or params.softcap is not None or packed.dtype != torch.float32:
        return reference.attention_update(state, packed, key, value, params, tree_mask)
    output, logsumexp = _fused(packed, key, value, params.scaling)
    maximum = torch.maximum(state.maximum, logsumexp)
    decay, weight = torch.exp(state.maximum - maximum), torch.exp(logsumexp - maximum)
    return PartialAttention(
        maximum,
        state.total * decay + weight,
        state.weighted * decay[..., None] + output * weight[..., None],
    )


def prefill_attention(query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
    """See ``reference.prefill_attention``. The chunk's own tokens and those before them go apart.

    In half precision both parts would be rounded, so the eager twin, which rounds once, stays.
    """
    tokens, before = query.shape[1], key.shape[1] - query.shape[1]
    simple = params.window is None and params.softcap is None and params.sinks is None
    if not simple or before == 0 or query.dtype != torch.float32:
        return reference.prefill_attention(query, key, value, params)
    group = query.shape[0] // key.shape[0]
    own_key, own_value = (part[:, before:].repeat_interleave(group, 0) for part in (key, value))
    own, of_own = _fused(query, own_key, own_value, params.scaling, causal=True)
    packed = pack_queries(query, key.shape[0])
    past, of_past = _fused(packed, key[:, :before], value[:, :before], params.scaling)
    share = torch.sigmoid(of_own - of_past.reshape(-1, tokens))  # of a softmax over both
    return past.reshape(own.shape).lerp_(own, share[..., None])


def _fused(query: Tensor, key: Tensor, value: Tensor, scaling: float, causal: bool = False) -> tuple[Tensor, Tensor]:
    """torch's fused attention of queries [H, T, D] over as many heads of keys: [H, T, D], log-sum-exp [H, T]."""
    output, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[None], key[None], value[None], 0.0, causal, attn_mask=None, scale=scaling
    )
    return output[0], logsumexp[0]


def take_chunks(
    selection: ChunkSelection, offered: Tensor, first: int, kv: Tensor, slots: Tensor | CodedChunks
) -> None:
    """See ``reference.take_chunks``. Where no offered chunk beats a held one, there is nothing to sort."""
    if not bool((offered.amax(dim=1) > selection.scores.amin(dim=1)).any()):
        return
    functions = loops("compiled") or reference
    reference.put_chunks(functions.select_chunks(selection, offered, first), kv, slots)


def chunk_scores(
    packed: Tensor, key: Tensor, chunk: int, scaling: float, baseline: Tensor, held: Tensor | None = None
) -> Tensor:
    """See ``reference.chunk_scores``."""
    functions = (None if key.dtype == torch.float32 else loops("compiled")) or reference
    return functions.chunk_scores(packed, key, chunk, scaling, baseline, held)


def decode_chunks(coded: CodedChunks, slots: int) -> tuple[Tensor, Tensor]:
    """See ``reference_codec.decode_chunks``."""
    return (loops("compiled") or reference_codec).decode_chunks(coded, slots)
