"""Settings: one frozen dataclass. What a setting means and takes is said by its field, here and for all commands."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from functools import partial
from typing import Any

from offload_triforce.errors import InputError
from offload_triforce.machine.units import MOST_BYTES, MOST_TOKENS, parse_bytes, parse_speed, parse_tokens

DEFAULT_BUDGET = 8192


def _setting(default: Any, text: str, **about: Any) -> Any:
    """A field with what is known about it.

    Args:
        default: its value if nobody gives one. text: one or two sentences for people.
        about: ``least``, ``most``: of a whole number. ``above``: a number that it must exceed. ``choices``: all values.
            ``tokens``: it counts tokens, and may be written as 128K. ``speed``: it is one, in GB/s, and may be written
            as 25Gb/s. ``size``: in bytes, and may be written as 24GB. ``panel``: where ``--help`` lists it.
    """
    return field(default=default, metadata={"help": text, **about})


_DRAFTING = "Speculation (the defaults find out what pays)"
_MEMORY = "Memory and link (chosen for the machine)"
_DETAILS = "Details"


@dataclass(frozen=True)
class Settings:
    """How a model is run. None of it changes the distribution of what comes out, only how fast it comes.

    What is None is chosen for the machine and the length of the text, see ``planner.choose``.

    Attributes:
    """

    context: int | None = _setting(
        None, "Most tokens of prompt and answer together; by default what each request needs.", least=2, tokens=True
    )
    budget: int | None = _setting(
        None,
        "Tokens in the retrieval cache, per KV head and layer; by default 8192, or a quarter of a short context.",
        least=1,
        tokens=True,
    )
    gamma: int = _setting(
        48,
        "Longest path of draft tokens per pass (gamma2 in the paper); 0 decodes plainly.",
        least=0,
        most=4096,
        panel=_DRAFTING,
    )
    gamma1: int = _setting(
        4, "Most draft tokens of the drafter per step of the retrieval level.", least=0, most=4096, panel=_DRAFTING
    )
    draft_tokens: int | None = _setting(
        None,
        "Most draft tokens per pass, over all paths; by default four times gamma, or gamma where topk is 1; on a GPU "
        "up to 16 times, where they take less than they bring, with steps of four times the width.",
        least=0,
        most=65_536,
        panel=_DRAFTING,
    )
    topk: int = _setting(
        4, "Most draft tokens for one place in the tree; 1 makes chains.", least=1, most=4096, panel=_DRAFTING
    )
    width: int = _setting(
        8,
        "Draft tokens that a step of the retrieval level reads, the drafter's apart.",
        least=1,
        most=65_536,
        panel=_DRAFTING,
    )
    adaptive: bool = _setting(
        True,
        "Draft only as far as it pays, by costs and acceptance that are measured on the way; else up to gamma.",
        panel=_DRAFTING,
    )
    draft_cost: float | None = _setting(
        None,
        "What a step of the retrieval level costs, in passes; by default that is measured.",
        above=0,
        panel=_DETAILS,
    )
    rule: str = _setting(
        "coupled",
        "How draft tokens are judged: coupled (plain decoding's text with this seed) or resampled (TriForce's rule).",
        choices=("coupled", "resampled"),
        panel=_DRAFTING,
    )
    refresh: bool = _setting(True, "Choose chunks anew in each pass; else once, after the prefill.", panel=_DRAFTING)
    overlap: bool = _setting(True, "Go on drafting while a pass is under way.", panel=_DRAFTING)
    chunk: int = _setting(8, "Tokens per retrieval chunk.", least=1, panel=_DETAILS)
    bits: int = _setting(
        4,
        "Of each number in the retrieval cache's chosen chunks: 4, 8, or 16 for the model's own dtype.",
        choices=(4, 8, 16),
        panel=_DRAFTING,
    )
    sink: int = _setting(
        8,
        "Tokens at the start of the text that are always attended; a multiple of the chunk.",
        least=0,
        tokens=True,
        panel=_DETAILS,
    )
    recent: int = _setting(64, "Newest tokens that are always attended.", least=1, tokens=True, panel=_DETAILS)
    draft_cache: int = _setting(
        256, "Tokens in a draft model's streaming cache.", least=4, tokens=True, panel=_DRAFTING
    )
    draft_sink: int = _setting(4, "Of them, tokens from the start of the text.", least=0, tokens=True, panel=_DETAILS)
    same_tokens: bool = _setting(
        False,
        "Take it as given that a draft model numbers its tokens as the target does, whatever the sizes of their "
        "(padded) vocabularies or their tokenizers say. Where that is wrong, drafts are, and nothing else.",
        panel=_DRAFTING,
    )
    tile: int | None = _setting(
        None,
        "Tokens per transfer, a multiple of the chunk; by default about 16 MB.",
        least=1,
        tokens=True,
        panel=_MEMORY,
    )
    ring: int | None = _setting(
        None, "Tiles in flight: staging buffers on the device; by default about 128 MB.", least=1, panel=_MEMORY
    )
    resident: float | None = _setting(
        None,
        "Share of the KV cache that lies on the device while decoding, 0 to 1; by default what a GPU has room for.",
        panel=_MEMORY,
    )
    prefill_resident: float | None = _setting(
        None,
        "Share of it that lies there while the prompt is read already; the rest comes up once, when the prefill's "
        "memory is free. By default what a GPU has room for.",
        panel=_MEMORY,
    )
    hidden_states: str | None = _setting(
        None,
        "Where the prompt's hidden states lie between two layers: device or host; by default on the device where they "
        "fit.",
        choices=("device", "host"),
        panel=_MEMORY,
    )
    embeddings: str | None = _setting(
        None,
        "Where the table of input embeddings lies: device or host; by default in host memory, for a GPU and where it "
        "is not the output's too.",
        choices=("device", "host"),
        panel=_MEMORY,
    )
    wire: str = _setting(
        "auto",
        "How the KV cache lies in host memory and crosses the link: coded (without loss, in 16-bit dtypes), raw, or "
        "auto: coded where there is a link and it makes tiles smaller.",
        choices=("raw", "coded", "auto"),
        panel=_MEMORY,
    )
    link_gbps: float | None = _setting(
        None, "Emulate a link of this speed, in GB/s; CPU only.", above=0, speed=True, panel=_MEMORY
    )
    reuse: bool = _setting(
        True, "Keep what was read of a text, for prompts that go on with it; else each is read from its beginning."
    )
    session_memory: int | None = _setting(
        None,
        "Host memory for texts that others have displaced, as 16GB; by default three quarters of what is free.",
        least=0,
        most=MOST_BYTES,
        size=True,
        panel=_MEMORY,
    )
    session_dir: str | None = _setting(
        None,
        "Folder for texts that memory has no room for, and for all when the engine closes; the next one finds them.",
        panel=_MEMORY,
    )
    prefill_chunk: int = _setting(
        1024, "Tokens per prefill step through one layer.", least=1, tokens=True, panel=_DETAILS
    )
    graphs: bool = _setting(
        True, "Replay the steps of levels 0 and 1 as CUDA graphs, where device and model allow it.", panel=_DRAFTING
    )
    check: bool = _setting(
        True,
        "Compare a model of a family that was never tried with transformers' own attention, on 64 tokens, and refuse "
        "it if they differ.",
        panel=_DETAILS,
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            _check(each, getattr(self, each.name))
        if self.draft_tokens is not None and self.draft_tokens < self.gamma:
            raise InputError(
                f"draft_tokens ({self.draft_tokens}) must not be smaller than gamma ({self.gamma}), the longest path"
            )
        for name in ("resident", "prefill_resident"):
            if (share := getattr(self, name)) is not None and not 0 <= share <= 1:
                raise InputError(f"{name} must be a share between 0 and 1, not {share}")
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
        """The paper's own way, as the yardstick: chains of 12, 2 of the drafter at a time, chunks chosen once.

        ``changes``: other settings, such as the budget.
        """
        fixed = {"gamma": 12, "gamma1": 2, "topk": 1, "width": 1, "adaptive": False, "rule": "resampled"}
        return cls.from_mapping({**fixed, "bits": 16, "refresh": False, "overlap": False, **changes})

    @property
    def most_draft_tokens(self) -> int:
        """Most draft tokens per pass."""
        if self.draft_tokens is not None:
            return self.draft_tokens
        return self.gamma if self.topk == 1 else 4 * self.gamma

    @property
    def block(self) -> int:
        """Most tokens that a pass reads: draft tokens, and the newest token of the text."""
        return self.most_draft_tokens + 1

    @property
    def news(self) -> int:
        """Most tokens that a pass brings."""
        return self.gamma + 1

    @property
    def room(self) -> int:
        """Most tokens that the retrieval level holds behind the text: draft tokens, and what turned out to be none."""
        return (2 if self.overlap else 1) * self.most_draft_tokens + 1 + self.width + self.gamma1

    @property
    def least_budget(self) -> int:
        """The smallest budget, with room for a single chunk."""
        return self.sink + self.recent + self.chunk

    def budget_for(self, context: int) -> int:
        """The budget at a context of that many tokens: as set, but no more than the context can use."""
        if self.budget is None:
            return max(self.least_budget, min(DEFAULT_BUDGET, context // 4))
        return min(self.budget, max(self.least_budget, context))


Settings.__doc__ = f"{Settings.__doc__}".rstrip() + "".join(
    f"\n        {each.name}: {each.metadata['help']}" for each in fields(Settings)
)


def _check(each: Field, value: Any) -> None:
    """Whether a value is what a field's metadata says. None stands for a choice of our own, where it is the default.

    Raises:
        InputError: it is not.
    """
    name, about = each.name, each.metadata
    if value is None and each.default is None:
        return
    if isinstance(each.default, bool):
        if not isinstance(value, bool):
            raise InputError(f"{name} must be True or False, not {value!r}")
    elif "choices" in about:
        if value not in about["choices"]:
            *others, last = map(str, about["choices"])
            raise InputError(f"{name} must be {', '.join(others)} or {last}, not {value!r}")
    elif "least" in about:
        if not isinstance(value, int) or isinstance(value, bool) or value < about["least"]:
            raise InputError(f"{name} must be a whole number of at least {about['least']}, not {value!r}")
        if value > (most := about.get("most", MOST_TOKENS)):  # a slip, and it would be looped over
            raise InputError(f"{name} must be at most {most:,}, not {value:,}")
    elif "above" in about and not about["above"] < value < math.inf:
        raise InputError(f"{name} must be greater than {about['above']} and finite, not {value}")


def _read(each: Field, value: Any) -> Any:
    """A setting's value, given as text where it has a unit: on the command line, in a file or from Python alike."""
    if not isinstance(value, str) or (unit := unit_of(each)) is None:
        return value
    return {"tokens": parse_tokens, "size": parse_bytes, "speed": partial(parse_speed, bare=True)}[unit](
        value, each.name
    )


def unit_of(each: Field) -> str | None:
    """What a setting that is given as text is measured in: "tokens", "size" or "speed"; None for all others."""
    return next((unit for unit in ("tokens", "size", "speed") if each.metadata.get(unit)), None)


def replace_settings(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """The same settings with some values changed; unknown keys raise InputError."""
    known = {each.name: each for each in fields(Settings)}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known settings: {', '.join(known)}"
            raise InputError(f"unknown setting {key!r}; {hint}")
    try:
        return replace(settings, **{name: _read(known[name], value) for name, value in values.items()})
    except TypeError as error:
        raise InputError(f"a setting has a value of the wrong type: {error}") from error
