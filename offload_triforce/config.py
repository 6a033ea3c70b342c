"""Settings: one frozen dataclass, validated when it is made."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from offload_triforce.errors import InputError

DEFAULT_BUDGET = 4096


@dataclass(frozen=True)
class Settings:
    """How a model is run. None of it changes the distribution of what comes out, only how fast it comes.

    Attributes:
        context: most tokens of prompt and answer together; None takes what each request needs.
        budget: tokens in the retrieval cache, per KV head and layer; None is 4096, or a quarter of a short context.
        gamma: guesses per pass over the full cache (gamma2 in the paper); 0 decodes plainly.
        gamma1: guesses of the draft per step of the retrieval level.
        chunk: tokens per retrieval chunk.
        sink: tokens at the start of the text that are always attended; a multiple of the chunk.
        recent: newest tokens that are always attended.
        draft_cache: tokens in the draft model's streaming cache. draft_sink: of them, from the start of the text.
        tile: tokens per transfer, a multiple of the chunk; None is about 16 MB.
        ring: tiles in flight: staging buffers on the device; None is about 128 MB.
        resident: share of the full cache's tiles that stays on the device, 0 to 1.
        link_gbps: emulate a link of this speed (GB/s); CPU only.
        prefill_chunk: tokens per prefill step through one layer.
        graphs: replay levels 0 and 1 as CUDA graphs, where the device and the model allow it.
    """

    context: int | None = None
    budget: int | None = None
    gamma: int = 12
    gamma1: int = 4
    chunk: int = 8
    sink: int = 8
    recent: int = 64
    draft_cache: int = 256
    draft_sink: int = 4
    tile: int | None = None
    ring: int | None = None
    resident: float = 0.0
    link_gbps: float | None = None
    prefill_chunk: int = 1024
    graphs: bool = True

    def __post_init__(self) -> None:
        least = {"context": 2, "budget": 1, "gamma": 0, "gamma1": 0, "chunk": 1, "sink": 0, "recent": 1}
        least |= {"draft_cache": 4, "draft_sink": 0, "tile": 1, "ring": 1, "prefill_chunk": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < lowest):
                raise InputError(f"{name} must be a whole number of at least {lowest}, not {value!r}")
        if not isinstance(self.graphs, bool):
            raise InputError(f"graphs must be True or False, not {self.graphs!r}")
        if not 0 <= self.resident <= 1:
            raise InputError(f"resident must be a share between 0 and 1, not {self.resident}")
        if self.link_gbps is not None and not self.link_gbps > 0:
            raise InputError(f"link_gbps must be greater than 0, not {self.link_gbps}")
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

    def budget_for(self, context: int) -> int:
        """The budget at a context of that many tokens: as set, but no more than the context can use."""
        least = self.sink + self.recent + self.chunk
        if self.budget is None:
            return max(least, min(DEFAULT_BUDGET, context // 4))
        return min(self.budget, max(least, context))


def replace_settings(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """The same settings with some values changed; unknown keys raise InputError."""
    known = [field.name for field in fields(Settings)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known settings: {', '.join(known)}"
            raise InputError(f"unknown setting {key!r}; {hint}")
    try:
        return replace(settings, **values)
    except TypeError as error:
        raise InputError(f"a setting has a value of the wrong type: {error}") from error
