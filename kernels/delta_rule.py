"""The gated delta rule over a tree and its short convolution, in Triton: the twins of ``reference_delta``.

A program has one value head and some of its columns, so the triangular system is its own: it solves blocks of 16 tokens
one after the other, each from what the blocks before have written. Keys, queries and the state come in parts of 32
elements of a head, again and again: from the second-level cache, as a layer's state is a few megabytes. Held in
registers instead, they spilled 2 KB per thread.
"""

# ruff: noqa: ANN001, ANN202 (the parameters of kernels are typed by Triton, at launch)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload_triforce.kernels.launch import Launch, check_rows, run
from offload_triforce.kernels.reference_delta import EPSILON
from offload_triforce.kernels.types import Convolution, DeltaNodes, DeltaTokens, NodeStep

BLOCK = tl.constexpr(16)  # tokens of a tree that are solved together
CHANNELS = 128  # of a convolution, per program
PART = tl.constexpr(32)  # of a head's elements, in one product

EPSILON_ = tl.constexpr(EPSILON)


def tree_convolution(convolution: Convolution, held: Tensor, step: NodeStep) -> Tensor:
    """See ``reference_delta.tree_convolution``."""
    output = torch.empty_like(convolution.inputs)
    run(convolution_launch(convolution, held, step, output))
    return output


def convolution_launch(convolution: Convolution, held: Tensor, step: NodeStep, output: Tensor) -> Launch:
    """What ``tree_convolution`` launches: a program per 16 tokens and CHANNELS channels."""
    inputs, weight, bias, activation = convolution
    (tokens, channels), taps = inputs.shape, weight.shape[1]
    arguments = (
        inputs, held, weight, bias, step.sources, step.places, output, tokens, channels,
        *inputs.stride(), held.stride(0), weight.stride(0), *output.stride(), taps, activation == "silu", CHANNELS,
    )  # fmt: skip
    grid = (-(-tokens // BLOCK.value), -(-channels // CHANNELS), 1)
    return Launch(_convolution_kernel, grid, arguments, {"num_warps": 4})


@triton.jit(do_not_specialize=["tokens"])
def _convolution_kernel(
    inputs, held, weight, bias, sources, places, output, tokens, channels,
    input_row, input_channel, held_row, weight_row, output_row, output_channel,
    TAPS: tl.constexpr, SILU: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """New tokens' inputs are read from where they come from: another program may not have written them yet."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    begin = tl.load(places) + TAPS - 1
    exists, inside = token < tokens, channel < channels
    there, wide = exists[:, None] & inside[None, :], channel.to(tl.int64)[None, :]
    own = tl.load(inputs + token.to(tl.int64)[:, None] * input_row + wide * input_channel, mask=there, other=0.0)
    tl.store(held + (begin + token)[:, None] * held_row + wide, own.to(held.dtype.element_ty), mask=there)

    sums = tl.zeros([BLOCK, CHANNELS], tl.float32)
    for tap in tl.static_range(TAPS):
        row = tl.load(sources + token * TAPS + tap, mask=exists, other=0)
        new = (row >= begin)[:, None]
        text = tl.load(held + row[:, None] * held_row + wide, mask=there & ~new, other=0.0)
        fresh = tl.load(inputs + (row - begin)[:, None] * input_row + wide * input_channel, mask=there & new, other=0.0)
        factor = tl.load(weight + wide * weight_row + tap, mask=inside[None, :], other=0.0)
        sums += tl.where(new, fresh.to(tl.float32), text.to(tl.float32)) * factor.to(tl.float32)
    if bias is not None:
        sums += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    sums = sums.to(output.dtype.element_ty).to(tl.float32)  # rounded here as well, as the model's own function does
    if SILU:
        sums = sums / (1 + tl.exp(-sums))
    place = output + token.to(tl.int64)[:, None] * output_row + wide * output_channel
    tl.store(place, sums.to(output.dtype.element_ty), mask=there)


def delta_tree(tokens: DeltaTokens, state: Tensor, nodes: DeltaNodes, step: NodeStep) -> Tensor:
    """See ``reference_delta.delta_tree``."""
    check_rows(tokens.query, tokens.key, tokens.value, state, nodes.keys, nodes.updates, step.seen)
    count, keys, dim = tokens.query.shape
    queries = torch.empty(keys, count, dim, dtype=torch.float32, device=state.device)
    output = torch.empty(tokens.value.shape, dtype=tokens.value.dtype, device=state.device)
    run(enter_launch(tokens, queries, nodes, step))
    run(rule_launch(tokens, queries, state, nodes, step, output))
    return output


def enter_launch(tokens: DeltaTokens, queries: Tensor, nodes: DeltaNodes, step: NodeStep) -> Launch:
    """The first half of ``delta_tree``, which the state has no part in: a program per value head and block of tokens.

    ``queries`` float32 [Hk, T, Dk]: where they go, normalised and scaled.
    """
    count, keys, dim = tokens.key.shape
    values = tokens.value.shape[1]
    arguments = (
        tokens.query, tokens.key, tokens.gate, queries, nodes.keys, nodes.gates, nodes.decays, step.seen, step.places,
        dim**-0.5, count, step.seen.shape[1], *tokens.query.stride()[:2], *tokens.key.stride()[:2],
        *tokens.gate.stride(), queries.stride(0), nodes.keys.stride(0), nodes.gates.stride(0), step.seen.stride(0),
        values // keys, dim, triton.next_power_of_2(dim),
    )  # fmt: skip
    return Launch(_enter_kernel, (values, -(-count // BLOCK.value), 1), arguments, {"num_warps": 4})


@triton.jit(do_not_specialize=["tokens", "rows"])
def _enter_kernel(
    query, key, gate, queries, keys, gates, decays, seen, places, scale, tokens, rows,
    query_token, query_head, key_token, key_head, gate_token, gate_head, queries_head, keys_head, gates_head, seen_row,
    GROUPS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write the new tokens' queries, keys, gates and decays. Gates are read from where they come from: another program
    may not have written them yet.
    """
    head, token = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin, exists, wide = tl.load(places), token < tokens, token.to(tl.int64)
    own = tl.load(gate + wide * gate_token + head * gate_head, mask=exists, other=0.0)
    decay = tl.zeros([BLOCK], tl.float32)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        there = exists[:, None] & (row < rows)[None, :]
        sees = tl.load(seen + wide[:, None] * seen_row + row[None, :], mask=there, other=0)
        new = (row >= begin) & (row < begin + tokens)
        held = tl.load(gates + head * gates_head + row, mask=row < begin, other=0.0)
        fresh = tl.load(gate + (row - begin) * gate_token + head * gate_head, mask=new, other=0.0)
        both = tl.where(new, fresh.to(tl.float32), held)
        decay += tl.sum(tl.where(sees != 0, both[None, :], 0.0), 1)
    tl.store(gates + head * gates_head + begin + token, own.to(tl.float32), mask=exists)
    tl.store(decays + head * gates_head + begin + token, decay, mask=exists)
    if head % GROUPS == 0:
        group, dims = head // GROUPS, tl.arange(0, WIDE)[None, :]
        inside = exists[:, None] & (dims < DIM)
        q = tl.load(query + wide[:, None] * query_token + group * query_head + dims, mask=inside, other=0.0)
        k = tl.load(key + wide[:, None] * key_token + group * key_head + dims, mask=inside, other=0.0)
        tl.store(queries + group * queries_head + wide[:, None] * DIM + dims, _normalised(q) * scale, mask=inside)
        tl.store(keys + group * keys_head + (begin + wide)[:, None] * DIM + dims, _normalised(k), mask=inside)


@triton.jit
def _normalised(vectors):
    vectors = vectors.to(tl.float32)
    return vectors * tl.rsqrt(tl.sum(vectors * vectors, 1) + EPSILON_)[:, None]


def _columns(columns: int) -> int:
    """Columns of a state that a program has."""
    return 32 if columns > 16 else 16


def rule_launch(
    tokens: DeltaTokens, queries: Tensor, state: Tensor, nodes: DeltaNodes, step: NodeStep, output: Tensor
) -> Launch:
    """The second half: updates and outputs. A program per value head and some columns of its state."""
    count, keys, dim = tokens.key.shape
    values, columns = tokens.value.shape[1:]
    block = _columns(columns)
    arguments = (
        queries, tokens.value, tokens.beta, state, nodes.keys, nodes.updates, nodes.decays, step.seen, step.places,
        output, count, columns, queries.stride(0), *tokens.value.stride()[:2], *tokens.beta.stride(), state.stride(0),
        nodes.keys.stride(0), nodes.updates.stride(0), nodes.decays.stride(0), step.seen.stride(0),
        *output.stride()[:2], values // keys, dim, block,
    )  # fmt: skip
    return Launch(_rule_kernel, (values, -(-columns // block), 1), arguments, {"num_warps": 4})


@triton.jit(do_not_specialize=["tokens"])
def _rule_kernel(
    queries, value, beta, state, keys, updates, decays, seen, places, output, tokens, columns,
    queries_head, value_token, value_head, beta_token, beta_head, state_head,
    keys_head, updates_head, decays_head, seen_row, output_token, output_head,
    GROUPS: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Block after block: what the state and earlier rows say, then the block's own triangle, row after row."""
    head, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    begin, inside, local = tl.load(places), column < columns, tl.arange(0, BLOCK)
    queries += (head // GROUPS) * queries_head
    keys += (head // GROUPS) * keys_head
    state += head * state_head
    updates += head * updates_head
    decays += head * decays_head
    for first in range(0, tokens, BLOCK):
        token = (first + local).to(tl.int64)
        exists = token < tokens
        mine = exists[:, None] & inside[None, :]
        decay = tl.load(decays + begin + token, mask=exists, other=0.0)
        said, read = _read_state(keys + begin * DIM, queries, state, token, exists, column, columns, DIM, COLUMNS)
        said *= tl.exp(decay)[:, None]
        read *= tl.exp(decay)[:, None]
        for start in range(0, begin + first, BLOCK):
            row = (start + local).to(tl.int64)
            known = row < begin + first
            place = updates + row[:, None] * columns + column[None, :]
            before = tl.load(place, mask=known[:, None] & inside[None, :], other=0.0)
            far = _distance(seen, decays, token, row, exists, known, decay, seen_row)
            of_key, of_query = _products(keys + begin * DIM, queries, keys, token, row, exists, known, DIM)
            said += tl.dot(of_key * far, before, input_precision="ieee")
            read += tl.dot(of_query * far, before, input_precision="ieee")

        v = tl.load(value + token[:, None] * value_token + head * value_head + column[None, :], mask=mine, other=0.0)
        b = tl.load(beta + token * beta_token + head * beta_head, mask=exists, other=0.0).to(tl.float32)[:, None]
        u = b * (v.to(tl.float32) - said)
        far = _distance(seen, decays, token, begin + token, exists, exists, decay, seen_row)
        of_key, of_query = _products(keys + begin * DIM, queries, keys + begin * DIM, token, token, exists, exists, DIM)
        lower = tl.where(local[:, None] > local[None, :], of_key * far * b, 0.0)
        for i in range(1, BLOCK):
            line = tl.sum(tl.where((local == i)[:, None], lower, 0.0), 0)
            u = tl.where((local == i)[:, None], u - tl.sum(line[:, None] * u, 0)[None, :], u)
        tl.store(updates + (begin + token)[:, None] * columns + column[None, :], u, mask=mine)
        read += tl.dot(of_query * far, u, input_precision="ieee")
        target = output + token[:, None] * output_token + head * output_head + column[None, :]
        tl.store(target, read.to(output.dtype.element_ty), mask=mine)
        tl.debug_barrier()  # the next block reads what all threads of this one have written


@triton.jit
def _part(vectors, row, exists, dims, DIM: tl.constexpr):
    """Some elements of some rows of [N, DIM]."""
    return tl.load(
        vectors + row[:, None] * DIM + dims[None, :], mask=exists[:, None] & (dims < DIM)[None, :], other=0.0
    )


@triton.jit
def _read_state(
    keys, queries, state, token, exists, column, columns, DIM: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """What a block's keys and queries read from the state: float32 [BLOCK, COLUMNS] each."""
    said = tl.zeros([BLOCK, COLUMNS], tl.float32)
    read = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for start in range(0, DIM, PART):
        dims = start + tl.arange(0, PART)
        there = (dims < DIM)[:, None] & (column < columns)[None, :]
        s = tl.load(state + dims.to(tl.int64)[:, None] * columns + column[None, :], mask=there, other=0.0)
        said += tl.dot(_part(keys, token, exists, dims, DIM), s, input_precision="ieee")
        read += tl.dot(_part(queries, token, exists, dims, DIM), s, input_precision="ieee")
    return said, read


@triton.jit
def _products(keys, queries, others, token, row, exists, known, DIM: tl.constexpr):
    """Products of a block's keys and queries with the keys of other rows: float32 [BLOCK, BLOCK] each."""
    of_key = tl.zeros([BLOCK, BLOCK], tl.float32)
    of_query = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, DIM, PART):
        dims = start + tl.arange(0, PART)
        other = tl.trans(_part(others, row, known, dims, DIM))
        of_key += tl.dot(_part(keys, token, exists, dims, DIM), other, input_precision="ieee")
        of_query += tl.dot(_part(queries, token, exists, dims, DIM), other, input_precision="ieee")
    return of_key, of_query


@triton.jit
def _distance(seen, decays, token, row, exists, known, decay, seen_row):
    """What is left of each row's update when each token reads it; nothing of those that it does not see."""
    there = exists[:, None] & known[None, :]
    sees = tl.load(seen + token[:, None] * seen_row + row[None, :], mask=there, other=0) != 0
    before = tl.load(decays + row, mask=known, other=0.0)
    return tl.where(sees, tl.exp(tl.where(sees, decay[:, None] - before[None, :], 0.0)), 0.0)


def commit_path(state: Tensor, keys: Tensor, updates: Tensor, decays: Tensor) -> None:
    """See ``reference_delta.commit_path``."""
    check_rows(state, keys, updates)
    run(commit_launch(state, keys, updates, decays))


def commit_launch(state: Tensor, keys: Tensor, updates: Tensor, decays: Tensor) -> Launch:
    """What ``commit_path`` launches: a program per layer, value head, and part and some columns of its state."""
    layers, values, dim, columns = state.shape
    block = _columns(columns)
    arguments = (
        state, keys, updates, decays, keys.shape[2], columns, values, state.stride(0), state.stride(1),
        keys.stride(0), keys.stride(1), updates.stride(0), updates.stride(1), decays.stride(0), decays.stride(1),
        values // keys.shape[1], dim, block,
    )  # fmt: skip
    grid = layers * values, -(-dim // PART.value), -(-columns // block)
    return Launch(_commit_kernel, grid, arguments, {"num_warps": 4})


@triton.jit(do_not_specialize=["tokens"])
def _commit_kernel(
    state, keys, updates, decays, tokens, columns, heads, state_layer, state_head,
    keys_layer, keys_head, updates_layer, updates_head, decays_layer, decays_head,
    GROUPS: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The path's products of keys and updates, faded to its end, on top of the faded state."""
    layer, head = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    dims = tl.program_id(1) * PART + tl.arange(0, PART)
    column, local = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, BLOCK)
    inside = column < columns
    keys += layer * keys_layer + (head // GROUPS) * keys_head
    updates += layer * updates_layer + head * updates_head
    decays += layer * decays_layer + head * decays_head
    place = state + layer * state_layer + head * state_head + dims.to(tl.int64)[:, None] * columns + column[None, :]
    there = (dims < DIM)[:, None] & inside[None, :]
    end = tl.load(decays + tokens - 1)
    s = tl.load(place, mask=there, other=0.0) * tl.exp(end)
    for start in range(0, tokens, BLOCK):
        row = (start + local).to(tl.int64)
        known = row < tokens
        u = tl.load(
            updates + row[:, None] * columns + column[None, :], mask=known[:, None] & inside[None, :], other=0.0
        )
        fade = tl.exp(tl.where(known, end - tl.load(decays + row, mask=known, other=0.0), 0.0))
        s += tl.dot(tl.trans(_part(keys, row, known, dims, DIM)), u * fade[:, None], input_precision="ieee")
    tl.store(place, s, mask=there)
