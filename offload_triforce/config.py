"""Settings: one frozen dataclass, validated when it is made."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from offload_triforce.errors import InputError
from offload_triforce.machine.units import MOST_TOKENS, parse_speed, parse_tokens

DEFAULT_BUDGET = 8192
RULES = ("coupled", "resampled")
BITS = (4, 8, 16)
# What is larger is a slip, and would be looped over.
_MOST = {"gamma": 4096, "gamma1": 4096, "branches": 4096, "width": 65_536, "tree": 65_536}
_CHOSEN = ("context", "budget", "tree", "tile", "ring")  # None: for the machine and the text


@dataclass(frozen=True)
class Settings:
    """How a model is run. None of it changes the distribution of what comes out, only how fast it comes.

    What is None is chosen for the machine and the length of the text, see ``planner.choose``.

    Attributes:
        context: most tokens of prompt and answer together; None takes what each request needs.
        budget: tokens in the retrieval cache, per KV head and layer; None is 8192, or a quarter of a short context.
        gamma: longest path of guesses per pass over the full cache (gamma2 in the paper); 0 decodes plainly.
        gamma1: most guesses of the draft per step of the retrieval level.
        tree: most guesses per pass, over all paths; None is four times gamma, or gamma without branches.
        branches: most guesses for one place; 1 makes chains.
        width: guesses that a step of the retrieval level reads, those of the draft apart.
        adaptive: guess only as far as it pays, by costs and acceptance that are measured on the way; else up to gamma.
        draft_cost: what a step of the retrieval level costs, in passes; None measures it.
        rule: "coupled" or "resampled", see ``speculation.rules``.
        refresh: choose anew for the retrieval cache in each pass; else once, after the prefill.
        ahead: go on guessing while a pass is under way.
        chunk: tokens per retrieval chunk.
        bits: of each number in the retrieval cache's chosen chunks: 4, 8, or 16 for the model's own dtype. Few make
            room for more tokens; what comes out is the same.
        sink: tokens at the start of the text that are always attended; a multiple of the chunk.
        recent: newest tokens that are always attended.
        draft_cache: tokens in the draft model's streaming cache. draft_sink: of them, from the start of the text.
        same_tokens: take it as given that a draft model numbers its tokens as the target does, whatever the sizes of
            their (padded) vocabularies or their tokenizers say. Where that is wrong, drafts are, and nothing else.
        tile: tokens per transfer, a multiple of the chunk; None is about 16 MB.
        ring: tiles in flight: staging buffers on the device; None is about 128 MB.
        resident: share of the full cache's tiles that stays on the device, 0 to 1; None is what a GPU has room for, and
            none of them on a CPU.
        link_gbps: emulate a link of this speed (GB/s); CPU only.
        prefill_chunk: tokens per prefill step through one layer.
        graphs: replay levels 0 and 1 as CUDA graphs, where the device and the model allow it.
    """

    context: int | None = None
    budget: int | None = None
    gamma: int = 48
    gamma1: int = 4
    tree: int | None = None
    branches: int = 4
    width: int = 8
    adaptive: bool = True
    draft_cost: float | None = None
    rule: str = "coupled"
    refresh: bool = True
    ahead: bool = True
    chunk: int = 8
    bits: int = 4
    sink: int = 8
    recent: int = 64
    draft_cache: int = 256
    draft_sink: int = 4
    same_tokens: bool = False
    tile: int | None = None
    ring: int | None = None
    resident: float | None = None
    link_gbps: float | None = None
    prefill_chunk: int = 1024
    graphs: bool = True

    def __post_init__(self) -> None:
        least = {"context": 2, "budget": 1, "gamma": 0, "gamma1": 0, "chunk": 1, "sink": 0, "recent": 1}
        least |= {"tree": 0, "branches": 1, "width": 1}
        least |= {"draft_cache": 4, "draft_sink": 0, "tile": 1, "ring": 1, "prefill_chunk": 1}
        for name, lowest in least.items():
            value, highest = getattr(self, name), _MOST.get(name, MOST_TOKENS)
            if value is None and name in _CHOSEN:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                raise InputError(f"{name} must be a whole number of at least {lowest}, not {value!r}")
            if value > highest:
                raise InputError(f"{name} must be at most {highest:,}, not {value:,}")
        for name in ("graphs", "adaptive", "refresh", "ahead", "same_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if self.bits not in BITS:
            raise InputError(f"bits must be 4, 8 or 16, not {self.bits!r}")
        if self.rule not in RULES:
            raise InputError(f"rule must be {' or '.join(RULES)}, not {self.rule!r}")
        for name in ("draft_cost", "link_gbps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name} must be greater than 0 and finite, not {value}")
        if self.tree is not None and self.tree < self.gamma:
            raise InputError(
                f"tree ({self.tree}) must not be smaller than gamma ({self.gamma}), the longest path in it"
            )
        if self.resident is not None and not 0 <= self.resident <= 1:
            raise InputError(f"resident must be a share between 0 and 1, not {self.resident}")
        for name in ("sink", "tile"):
            if (getattr(self, name) or 0) % self.chunk:
                raise InputError(f"{name} must be a multiple of the chunk of {self.chunk}, not {getattr(self, name)}")
        if self.tile is not None and self.tile < self.sink:
            raise InputError(f"tile ({self.tile}) must not be smaller than sink ({self.sink})")
        if self.context is not None and self.budget is not None and self.budget > self.context:
            raise InputError(
                f"budget {self.budget} is larger than the context of {self.context} tokens by "
                f"{self.budget - self.context}; a quarter of the context is a good start"
            )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Settings:
        """Settings from keys and values.

        Raises:
            InputError: an unknown key (with the nearest known one) or a value out of range.
        """
        return replace_settings(cls(), values)

    @classmethod
    def triforce(cls, **changes: Any) -> Settings:
        """The paper's own way, as the yardstick: chains of 12 guesses, 2 of the draft at a time, chunks chosen once.

        ``changes``: other settings, such as the budget.
        """
        fixed = {"gamma": 12, "gamma1": 2, "branches": 1, "width": 1, "adaptive": False, "rule": "resampled"}
        return cls.from_mapping({**fixed, "bits": 16, "refresh": False, "ahead": False, **changes})

    @property
    def nodes(self) -> int:
        """Most guesses per pass."""
        if self.tree is not None:
            return self.tree
        return self.gamma if self.branches == 1 else 4 * self.gamma

    @property
    def block(self) -> int:
        """Most tokens that a pass reads: guesses, and the newest token of the text."""
        return self.nodes + 1

    @property
    def news(self) -> int:
        """Most tokens that a pass brings."""
        return self.gamma + 1

    @property
    def drafts(self) -> int:
        """Most tokens that the retrieval level holds behind the text: guesses, and those that turn out to be none."""
        return (2 if self.ahead else 1) * self.nodes + 1 + self.width + self.gamma1

    def budget_for(self, context: int) -> int:
        """The budget at a context of that many tokens: as set, but no more than the context can use."""
        if self.budget is None:
            return max(self.least_budget, min(DEFAULT_BUDGET, context // 4))
        return min(self.budget, max(self.least_budget, context))

    @property
    def least_budget(self) -> int:
        """The smallest budget, with room for a single chunk."""
        return self.sink + self.recent + self.chunk


# Settings that count tokens: they may be given as text too, as 128K or 131,072.
IN_TOKENS = ("context", "budget", "sink", "recent", "draft_cache", "draft_sink", "tile", "prefill_chunk")


def _read(name: str, value: Any) -> Any:
    """A setting's value, given as text where it has a unit: on the command line, in a file or from Python alike."""
    if not isinstance(value, str):
        return value
    if name in IN_TOKENS:
        return parse_tokens(value, name)
    return parse_speed(value, name, bare=True) if name == "link_gbps" else value


def replace_settings(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """The same settings with some values changed; unknown keys raise InputError."""
    known = [field.name for field in fields(Settings)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known settings: {', '.join(known)}"
            raise InputError(f"unknown setting {key!r}; {hint}")
    try:
        return replace(settings, **{name: _read(name, value) for name, value in values.items()})
    except TypeError as error:
        raise InputError(f"a setting has a value of the wrong type: {error}") from error
