"""How a context is cut into tiles, a budget into chunks, and what it all takes: before anything is allocated.

From settings and a model's layout alone, for planning and running alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from offload_triforce.cache.sizes import RetrievalShape, tail_capacity, window_room
from offload_triforce.config import Settings
from offload_triforce.errors import InputError, MemoryLimitError
from offload_triforce.kernels import wire_format
from offload_triforce.kernels.wire_format import WireFormat
from offload_triforce.machine.memory import free_on, free_on_host
from offload_triforce.model.known import PlainConfig
from offload_triforce.model.outline import ModelLayout
from offload_triforce.scheduler.plan import RING_LIMIT, SLOTS, TilePlan, choose_ring, choose_tile

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Tensors of the size of a pass's logits at one time: soft-capping makes new ones on the way.
LOGITS = 3


# Tokens of a prompt that are read layer by layer at a time. After each such group the text can be gone on with by any
# prompt, should the rest be interrupted (within a group by those that have all its tokens: ``runtime/part``); each
# brings what was read before it over the link once more, which makes one and a half passes for all groups of 128K
# tokens.
GROUP = 32_768
# The same where layers have a window or a state: those are kept after each group, so that the text can be cut there.
MARKED_GROUP = 8_192


# Of windows and states that are kept, in host memory, so that a text can be cut there: at most so much.
CHECKPOINT_BYTES = 4 << 30


def group_tokens(layout: ModelLayout) -> int:
    """Tokens of a prompt that are read at a time; the memory of their hidden states is used again."""
    return MARKED_GROUP if layout.sliding or layout.recurrent else GROUP


def make_plan(layout: ModelLayout, settings: Settings, context: int) -> TilePlan | None:
    """The tiles of a model at a context of that many tokens; None if all its layers have a sliding window.

    Raises:
        InputError: the ring that the settings ask for is larger than it may be, or tiles cannot be coded as they ask.
    """
    if not layout.full:
        return None
    shape = layout.layers[layout.full[0]]
    token_bytes = layout.token_bytes(layout.full[0])
    tile = settings.tile or choose_tile(token_bytes, context, math.lcm(settings.chunk, settings.sink or 1))
    coded = coded_bytes(layout, settings, tile)
    wire = coded or tile * token_bytes
    ring = settings.ring or choose_ring(wire)
    if ring * wire > RING_LIMIT:
        raise InputError(
            f"a ring of {ring} tiles of {tile} tokens takes {ring * wire / 1e6:,.0f} MB on the device, "
            f"more than the {RING_LIMIT / 1e6:,.0f} MB that it may; at most {RING_LIMIT * tile // wire:,} tokens fit"
        )
    layers, tiles = len(layout.full), -(-context // tile)
    resident, early = settings.resident or 0.0, settings.prefill_resident
    late = 0 if early is None else max(0, int(layers * tiles * resident) - int(layers * tiles * early))
    return TilePlan(
        layers=layers,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        itemsize=layout.dtype.itemsize,
        tile_tokens=tile,
        tiles=tiles,
        ring=ring,
        resident=resident,
        late=late,
        coded_bytes=coded,
    )


def coded_bytes(layout: ModelLayout, settings: Settings, tile: int) -> int:
    """Bytes of a tile of so many tokens as it lies in host memory and crosses the link, coded; 0: it does so raw.

    Raises:
        InputError: the settings ask for coded tiles, and there is no code for such.
    """
    if settings.wire == "raw":
        return 0
    shape, asked = layout.layers[layout.full[0]], settings.wire == "coded"
    if not WireFormat.serves(tile, layout.dtype):
        if not asked:
            return 0
        if layout.dtype not in wire_format.MANTISSA:
            raise InputError(
                f"wire='coded' is for keys and values in bfloat16 or float16, and this model computes them in "
                f"{str(layout.dtype)[6:]}; load it in one of those, or take wire 'raw'"
            )
        group = wire_format.GROUP
        raise InputError(
            f"wire='coded' takes tiles of a multiple of {group} tokens, not {tile}; "
            f"{-(-tile // group) * group} would do"
        )
    form = WireFormat(shape.kv_heads, tile, shape.head_dim, layout.dtype)
    has_link = layout.device.type != "cpu" or settings.link_gbps is not None
    return form.bytes if asked or (has_link and form.bytes < form.raw_bytes) else 0


def make_shape(settings: Settings, context: int) -> RetrievalShape:
    """How the retrieval cache's budget is spent at a context of that many tokens."""
    return RetrievalShape(settings.budget_for(context), settings.chunk, settings.sink, settings.recent, settings.bits)


def draft_bytes(layout: ModelLayout, tokens: int) -> int:
    """What a draft model's streaming cache of that many tokens takes on the device."""
    layers = [*layout.full, *layout.sliding]
    size = tokens * sum(layout.token_bytes(layer) for layer in layers)
    for layer in layout.recurrent:
        shape = layout.layers[layer]
        size += shape.state_bytes(layout.dtype.itemsize) + tokens * shape.node_bytes(layout.dtype.itemsize)
    return size


def hidden_bytes(layout: ModelLayout, settings: Settings, width: int) -> int:
    """What the newest hidden states of that width take on the device, which an MTP head reads; 0: nobody does."""
    return (settings.draft_cache + settings.draft_sink) * width * layout.dtype.itemsize


class Configured(Protocol):
    """A model, loaded or only planned."""

    @property
    def config(self) -> PretrainedConfig:
        """transformers' own."""


@dataclass(frozen=True)
class Needs:
    """Bytes beside the weights by purpose: in host memory, and on the device."""

    host: dict[str, int]
    caches: dict[str, int]  # held all along
    prefill: dict[str, int]  # held while the prompt is read
    decoding: dict[str, int]  # held from then on, in the same memory

    @property
    def device(self) -> int:
        """Most bytes on the device at one time."""
        return sum(self.caches.values()) + max(sum(self.prefill.values()), sum(self.decoding.values()))

    @property
    def host_bytes(self) -> int:
        """All in host memory."""
        return sum(self.host.values())

    @property
    def fixed(self) -> int:
        """Of these, those that hardly depend on the length of the text."""
        everything = self.caches | self.prefill
        return sum(everything.get(part, 0) for part in ("ring", "tail", "retrieval cache", "activations of a chunk"))


def work_out(
    model: Configured,
    layout: ModelLayout,
    settings: Settings,
    shape: RetrievalShape,
    plan: TilePlan | None,
    context: int,
) -> Needs:
    """What a text of ``context`` tokens takes. ``plan`` is None when all layers have a sliding window."""
    config, itemsize, block = model.config.get_text_config(), layout.dtype.itemsize, settings.block
    caches, host, decoding = {}, {}, {}
    if layout.sliding:
        room = window_room([layout.layers[i].window for i in layout.sliding], context, block) + settings.room
        caches["sliding windows"] = room * sum(layout.token_bytes(i) for i in layout.sliding)
    if plan is not None:
        token = plan.token_bytes * plan.layers
        caches["resident tiles"] = plan.resident_bytes - plan.late_bytes
        decoding["more resident tiles"] = plan.late_bytes
        caches["ring"] = plan.ring_bytes
        caches["coding"] = plan.coding_bytes
        keep = shape.tail_needed(settings.news)
        caches["tail"] = tail_capacity(plan, keep, block, settings.news) * token
        near = shape.near(settings.news, settings.room)
        chosen = plan.layers * plan.kv_heads * shape.chosen_bytes(plan.head_dim, itemsize)
        caches["retrieval cache"] = chosen + near * token
        # Which chunks are chosen: one byte per chunk, one int64 and one float32 per slot.
        caches["choice"] = plan.layers * plan.kv_heads * (context // shape.chunk + 12 * shape.slots)
        host["tiles of the full cache"] = plan.host_bytes
    if layout.recurrent:
        one, count = layout.layers[layout.recurrent[0]], len(layout.recurrent)
        caches["recurrent states"] = count * one.state_bytes(itemsize)
        caches["draft tokens of recurrent layers"] = count * (block + settings.room) * one.node_bytes(itemsize)
    if layout.sliding or layout.recurrent:
        host["checkpoints of windows and states"] = checkpoints_bytes(layout, context)
    decoding["activations of a pass"] = activation_bytes(config, layout, block)
    decoding["logits of a pass"] = LOGITS * block * layout.vocabulary * itemsize
    chunk = min(settings.prefill_chunk, context)
    states = config.hidden_size * itemsize  # of a token
    on_host, group = settings.hidden_states == "host", min(context, group_tokens(layout))
    if on_host:
        host["hidden states of the prompt"] = group * states
    prefill = {
        "keys and values of one layer": context * max(layout.token_bytes(i) for i in range(len(layout.layers))),
        "hidden states": (min(group, SLOTS * chunk) if on_host else group) * states,
        "rotary embeddings": group * rotary_numbers(config, layout) * itemsize,
        "activations of a chunk": activation_bytes(config, layout, chunk),
    }
    if kept := _kept_inputs(config, layout):
        prefill["inputs of single layers"] = group * kept
    return Needs(host, caches, prefill, decoding)


def checkpoints_bytes(layout: ModelLayout, context: int) -> int:
    """What is kept of a text of so many tokens, to be able to cut it: after each group, and at its end."""
    reach = min(context, max((layout.layers[i].window for i in layout.sliding), default=0))
    size = reach * sum(layout.token_bytes(i) for i in layout.sliding)
    size += sum(layout.layers[i].checkpoint_bytes(layout.dtype.itemsize) for i in layout.recurrent)
    return max(2 * size, min(CHECKPOINT_BYTES, size * (1 + -(-context // MARKED_GROUP))))


def _kept_inputs(config: PretrainedConfig | PlainConfig, layout: ModelLayout) -> int:
    """Bytes per token of what layers are given beside hidden states: an input of their own, keys and values of others.

    Where later layers attend over keys and values of earlier ones, those are of the last layer of each kind before.
    """
    inputs = (getattr(config, "hidden_size_per_layer_input", None) or 0) * len(layout.layers) * layout.dtype.itemsize
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    if not shared:
        return inputs
    own = range(len(layout.layers) - shared)
    makers = [max((i for i in kind if i in own), default=None) for kind in (layout.full, layout.sliding)]
    return inputs + sum(layout.token_bytes(maker) for maker in makers if maker is not None)


def activation_bytes(config: PretrainedConfig | PlainConfig, layout: ModelLayout, tokens: int) -> int:
    """What a layer holds on the way for that many tokens, roughly. ``config``: transformers' own, of a text model.

    Gate, up and their product; queries, keys, values, residuals and norms in float32.
    """
    width, heads = config.hidden_size, config.num_attention_heads
    inner = getattr(config, "intermediate_size", None) or 4 * width
    if getattr(config, "use_double_wide_mlp", False):
        inner *= 2
    # Asked of the layers: a configuration with several sizes of heads names none.
    queries = heads * max(layer.head_dim for layer in layout.attention)
    return tokens * (3 * inner + 5 * width + 3 * max(width, queries)) * layout.dtype.itemsize


def rotary_numbers(config: PretrainedConfig, layout: ModelLayout) -> int:
    """How many sines and cosines of a token are kept while the prompt is read. ``config``: of a text model.

    Some turn a part of each head only, and some have frequencies of their own for layers with a window.
    """
    ropes = getattr(config, "rope_parameters", None) or {}
    kinds = {"full_attention": layout.full, "sliding_attention": layout.sliding}
    if not any(kind in ropes for kind in kinds):  # one for all layers
        common = {"partial_rotary_factor": getattr(config, "partial_rotary_factor", None), **ropes}
        ropes, kinds = {"all": common}, {"all": [*layout.full, *layout.sliding]}
    width = 0
    for kind, layers in kinds.items():
        rope = ropes.get(kind) or {}
        whole = max((layout.layers[layer].head_dim for layer in layers), default=0)
        # "Proportional" ones are as wide as the head: the rest of it is turned by nothing.
        part = 1.0 if rope.get("rope_type") == "proportional" else rope.get("partial_rotary_factor") or 1.0
        width += 2 * int(whole * part)
    return width


def check_memory(needs: Needs, device: torch.device, context: int) -> None:
    """Refuse what cannot fit.

    Raises:
        MemoryLimitError: how much is missing, and a context that would fit.
    """
    free = free_on_host()
    if device.type == "cuda":
        _compare("device", needs.device, needs.fixed, free_on(device), context)
        _compare("host", needs.host_bytes, 0, free, context)
    else:
        _compare("host", needs.host_bytes + needs.device, needs.fixed, free, context)


def _compare(kind: str, needed: int, fixed: int, free: int, context: int) -> None:
    if needed <= free:
        return
    fits = max(0, int(context * (free - fixed) / (needed - fixed) * 0.95) // 1024 * 1024)
    hint = f"a context of {fits:,} tokens would fit" if fits else "free some memory or take a smaller model"
    raise MemoryLimitError(
        f"a context of {context:,} tokens needs {needed / 1e9:.1f} GB of {kind} memory, but {free / 1e9:.1f} GB are "
        f"free, {(needed - free) / 1e9:.1f} GB too little; {hint}"
    )
