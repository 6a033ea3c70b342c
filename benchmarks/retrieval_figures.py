"""The figures of a level beside the full model: draft tokens accepted, attention held."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.retrieval_level import ChosenLevel
from benchmarks.retrieval_ways import BLOCK
from offload_triforce.speculation.acceptance import GAP, KINDS, MOST_CANDIDATES

TEMPERATURES = (0.6, 1.0)
DRAWS = 4  # of noise, for each token
CHAIN = 32


class Target:
    """What the full model says to T tokens, and what it draws: what levels are compared to."""

    def __init__(self, logits: Tensor, generator: torch.Generator) -> None:
        """``logits``: [T, V]."""
        logits = logits.float()
        self.greedy = logits.argmax(-1)
        self.noise = torch.empty(DRAWS, *logits.shape, device=logits.device)
        self.noise.exponential_(generator=generator).log_().neg_()  # standard Gumbel
        self.rows = {t: (logits / t).softmax(-1) for t in TEMPERATURES}
        self.drawn = {t: (logits / t + self.noise).argmax(-1) for t in TEMPERATURES}  # [draws, T]


@dataclass
class Tally:
    """What was counted for one way, token by token; by temperature where that matters.

    Attributes:
        mass: of the attention that is held, per block. greedy: whether the best token is the same.
        overlap: one less the total variation distance of the distributions: what rejection accepts.
        ranks: of all draws, how many of the target's tokens are the level's candidate of each rank, [T, ranks].
        kinds: the same by rank and by ``Ranking.kind``, [hits or cases, ranks, kinds].
    """

    mass: list[float] = field(default_factory=list)
    greedy: list[float] = field(default_factory=list)
    overlap: dict[float, list[float]] = field(default_factory=lambda: {t: [] for t in TEMPERATURES})
    ranks: dict[float, list[Tensor]] = field(default_factory=lambda: {t: [] for t in TEMPERATURES})
    kinds: Tensor = field(default_factory=lambda: torch.zeros(2, MOST_CANDIDATES, KINDS))

    def add(self, target: Target, logits: Tensor, mass: float) -> None:
        """Compare a level's ``logits`` [T, V]."""
        logits = logits.float()
        self.mass.append(mass)
        self.greedy += (logits.argmax(-1) == target.greedy).float().tolist()
        for t in TEMPERATURES:
            row = (logits / t).softmax(-1)
            self.overlap[t] += torch.minimum(row, target.rows[t]).sum(-1).tolist()
            scores, tokens = (logits / t + target.noise).topk(MOST_CANDIDATES, dim=-1)  # [draws, T, ranks]
            hit = tokens == target.drawn[t][..., None]
            self.ranks[t].append(hit.float().mean(0).cpu())
            self._count(scores, hit)

    def _count(self, scores: Tensor, hit: Tensor) -> None:
        gaps = scores[..., :1] - scores
        gaps[..., 0] = scores[..., 0] - scores[..., 1]
        kinds = (gaps / GAP).clamp(max=KINDS - 1).long()
        for rank in range(MOST_CANDIDATES):
            kind, hits = kinds[..., rank].flatten().cpu(), hit[..., rank].flatten().cpu()
            self.kinds[0, rank] += torch.bincount(kind[hits], minlength=KINDS)
            self.kinds[1, rank] += torch.bincount(kind, minlength=KINDS)


def chain_yield(overlap: Sequence[float], length: int) -> float | None:
    """Tokens that a pass yields with a chain of ``length`` draft tokens, each accepted as ``overlap`` says.

    On average over where the pass begins. The target's own token counts. None where fewer have been measured.
    """
    starts = len(overlap) - length + 1
    if starts < 1:
        return None
    total = 0.0
    for start in range(starts):
        reach = 1.0
        for share in overlap[start : start + length]:
            total += reach
            reach *= share
        total += reach
    return total / starts


def make_row(level: ChosenLevel, tally: Tally, usual: Tally, head_dim: int) -> dict[str, Any]:
    """The figures of one way, for JSON; ``usual`` is what the default has."""
    way, shape = level.way, level.way.shape
    row: dict[str, Any] = {"way": way.name, "about": way.about, "chunk": shape.chunk, "bits": shape.bits}
    row |= {"tokens": shape.budget, "slots": shape.slots, "bytes": shape.held_bytes(head_dim, 2)}
    row |= {"key": way.key, "fold": way.fold, "queries": way.queries, "when": way.when, "layers": way.layers}
    if way.layers != "alike":
        row["layer_slots"] = level.slots
    row |= {"mass": statistics.mean(tally.mass), "greedy": statistics.mean(tally.greedy)}
    row["acceptance"] = {f"{t:g}": statistics.mean(tally.overlap[t]) for t in TEMPERATURES}
    row["change"] = {f"{t:g}": _change(tally.overlap[t], usual.overlap[t]) for t in TEMPERATURES}
    # Whether the target's token is among the level's first one, two, ... candidates, with the same noise.
    firsts = {t: torch.cat(tally.ranks[t]).mean(0).cumsum(0) for t in TEMPERATURES}
    row["among_first"] = {f"{t:g}": [round(share, 5) for share in firsts[t].tolist()] for t in TEMPERATURES}
    row["chain"] = {f"{t:g}": chain_yield(tally.overlap[t], CHAIN) for t in TEMPERATURES}
    return row


def _change(ours: Sequence[float], usual: Sequence[float]) -> dict[str, float | None]:
    """The mean difference, and its standard error: over blocks, since neighbouring tokens go together."""
    pairs = [a - b for a, b in zip(ours, usual, strict=True)]
    blocks = [statistics.mean(pairs[i : i + BLOCK]) for i in range(0, len(pairs), BLOCK)]
    error = statistics.stdev(blocks) / len(blocks) ** 0.5 if len(blocks) > 1 else None
    return {"mean": statistics.mean(blocks), "error": error}
