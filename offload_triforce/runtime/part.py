"""What is kept of a group of tokens that a stopped prefill has read in part.

A prefill takes a group layer by layer, so where it is stopped, no token of the group is through all layers. What the
layers have made of the tokens till then, and their hidden states, are kept in host memory, or on disk. A prompt that
goes on with all tokens of the group takes up the work at the very step where it was left. One that parts from it does
so with the whole chunks that both begin with, where all layers attend to everything: keys and values can be cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offload_triforce.cache.layer import Snapshot
from offload_triforce.errors import InputError
from offload_triforce.kernels.ops import AttentionParams
from offload_triforce.model.layer_view import AttentionPart, LayerPart, RecurrentPart
from offload_triforce.model.layout import ModelLayout
from offload_triforce.model.prefill import Halt
from offload_triforce.runtime.ids import common_prefix
from offload_triforce.runtime.runtime import PREFILL_QUERIES

HIDDEN = "hidden."  # before the names of what a drafter reads
# What layers have handed on to later ones, of a chunk: keys (0) and values (1) by a name.
_HANDED = re.compile(r"handed\.(\d{1,9})\.(.+)\.([01])")


@dataclass(frozen=True)
class PartRead:
    """What there is of a group.

    Attributes:
        held: tokens of the text before it. tokens: ids of the group, (n,) on the CPU.
        chunk: tokens of a step.
        layer, done: where it was stopped: all are through the layers before ``layer``, ``done`` chunks through itself.
        tensors: what is kept, by name, see ``taken_apart``.
    """

    held: int
    tokens: Tensor
    chunk: int
    layer: int
    done: int
    tensors: Snapshot

    @property
    def size(self) -> int:
        """Bytes in host memory."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def worth(self, layers: int, tokens: int) -> int:
        """Reading so many tokens whole, through all ``layers``, would have been about as much work.

        ``tokens``: of the group, those that are of use. At least 1, where there are any.
        """
        chunks = -(-tokens // self.chunk)
        return max(min(1, tokens), (self.layer * chunks + min(self.done, chunks)) * self.chunk // layers)

    def usable(self, rest: Tensor, cuttable: bool) -> int:
        """How many tokens of the group are of use for a text that goes on with ``rest`` (m,): all, some chunks, or 0.

        ``cuttable``: whether it is of a model whose layers all attend to everything. Some tokens have to follow then,
        as for any text that is cut: see ``find_start``.
        """
        shared = common_prefix(self.tokens, rest)
        if shared == len(self.tokens):
            return shared
        return max(0, min(shared, len(rest) - PREFILL_QUERIES)) // self.chunk * self.chunk if cuttable else 0

    def cut(self, tokens: int) -> PartRead:
        """The same of the first tokens alone, whole chunks: as if the group had ended there."""
        if tokens == len(self.tokens):
            return self
        kept = {}
        for name, tensor in self.tensors.items():
            if name.startswith("kv."):
                kept[name] = tensor[:, :, :tokens].clone()
            elif not name.startswith(HIDDEN):
                kept[name] = tensor[:tokens].clone() if name == "states" else tensor
        done = min(self.done, tokens // self.chunk)
        return PartRead(self.held, self.tokens[:tokens].clone(), self.chunk, self.layer, done, kept)

    def in_memory(self) -> PartRead:
        """The same, nothing of which lies on disk.

        Raises:
            InputError, StorageError: it cannot be read from there.
        """
        return PartRead(self.held, self.tokens, self.chunk, self.layer, self.done, dict(self.tensors))

    def halt(self, layout: ModelLayout) -> Halt:
        """Where a prefill of a model goes on. ``layout``: of that model."""
        tensors = self.tensors
        parts = [_layer_part(tensors, i, layout.layers[i]) for i in range(self.layer + (self.done > 0))]
        handed: list[dict[str, Any]] = []
        for name in sorted(name for name in tensors if name.startswith("handed.")):
            _, number, rest = name.split(".", 2)
            handed += [{} for _ in range(int(number) + 1 - len(handed))]
            key = rest.rpartition(".")[0]
            handed[int(number)][key] = (*handed[int(number)].get(key, ()), tensors[name])
        return Halt(self.layer, self.done, tensors["states"], parts, handed)

    @property
    def hidden(self) -> Snapshot:
        """Of the newest hidden states, where a drafter reads such and there are any."""
        return {n.removeprefix(HIDDEN): tensor for n, tensor in self.tensors.items() if n.startswith(HIDDEN)}

    def check(self, layout: ModelLayout, width: int, shares: bool) -> None:
        """Whether it is of a model. ``width``: of its hidden states. ``shares``: whether layers use others' keys.

        Raises:
            InputError: it is not, whatever it says.
        """
        expected = dict(_expected(self, layout, width))
        found = {n: t for n, t in self.tensors.items() if not n.startswith((HIDDEN, "handed."))}
        others = self.tensors.keys() - found.keys()
        wrong = sorted(expected.keys() ^ found.keys()) + sorted(self._misplaced(others, shares))
        wrong += [name for name in expected.keys() & found.keys() if not _fits(found[name], expected[name])]
        if wrong or not self.layer + self.done:
            raise InputError(
                f"what was read in part of {len(self.tokens):,} tokens is not of this model ({', '.join(wrong[:3])}); "
                "remove that session, and read its text again"
            )

    def _misplaced(self, names: Set[str], shares: bool) -> Iterator[str]:
        """Those that are neither the hidden states for a drafter nor what layers have handed on."""
        hidden = {name for name in names if name.startswith(HIDDEN)}
        yield from hidden ^ {HIDDEN + name for name in ("rows", "numbers")} if hidden else ()
        for name in names - hidden:
            match = _HANDED.fullmatch(name)
            usual = shares and match and int(match[1]) < -(-len(self.tokens) // self.chunk)
            if not usual or f"handed.{match[1]}.{match[2]}.{1 - int(match[3])}" not in names:
                yield name


def taken_apart(halt: Halt, hidden: Snapshot) -> dict[str, Tensor]:
    """All tensors of a stopped prefill, by name. ``hidden``: a snapshot of the newest hidden states, or nothing."""
    found = {"states": halt.states, **{HIDDEN + name: tensor for name, tensor in hidden.items()}}
    for i, part in enumerate(halt.parts):
        if isinstance(part, RecurrentPart):
            found |= {f"state.{i}": part.state, f"tail.{i}": part.tail}
        else:
            scores = torch.tensor([part.params.scaling, part.params.softcap or 0.0], dtype=torch.float64)
            found |= {f"kv.{i}": part.kv, f"queries.{i}": part.queries, f"scores.{i}": scores}
    for number, held in enumerate(halt.handed):
        for name, tensors in held.items():
            found |= {f"handed.{number}.{name}.{i}": tensor for i, tensor in enumerate(tensors)}
    return found


def _layer_part(tensors: Snapshot, i: int, shape: Any) -> LayerPart:
    if f"state.{i}" in tensors:
        return RecurrentPart(tensors[f"state.{i}"], tensors[f"tail.{i}"])
    scaling, softcap = tensors[f"scores.{i}"].tolist()
    params = AttentionParams(scaling, shape.window, softcap or None)  # the layer itself says the rest, if it is asked
    return AttentionPart(tensors[f"kv.{i}"], tensors[f"queries.{i}"], params)


def _expected(part: PartRead, layout: ModelLayout, width: int) -> Iterator[tuple[str, Sequence[int | None]]]:
    """Name and shape of all that there must be; None is any number."""
    count, reach = len(part.tokens), max((layout.layers[i].window for i in layout.sliding), default=0)
    layers, through = len(layout.layers), part.layer + (part.done > 0)
    if through > layers or part.done > -(-count // part.chunk):
        return
    yield "states", (count, width) if part.layer < layers else (0, 0)
    for i in range(through):
        shape = layout.layers[i]
        if i in layout.recurrent:
            yield f"state.{i}", (shape.value_heads, shape.key_dim, shape.value_dim)
            yield f"tail.{i}", (shape.taps - 1, shape.channels)
            continue
        kept = count if i < part.layer else min(count, part.done * part.chunk)
        if shape.window is not None and i < part.layer:
            kept = min(kept, reach)
        yield f"kv.{i}", (2, shape.kv_heads, kept, shape.head_dim)
        yield f"queries.{i}", (None, None, shape.head_dim)
        yield f"scores.{i}", (2,)


def _fits(tensor: Tensor, shape: Sequence[int | None]) -> bool:
    same = len(shape) == tensor.dim() and all(b is None or a == b for a, b in zip(tensor.shape, shape, strict=True))
    return same and tensor.is_floating_point()
