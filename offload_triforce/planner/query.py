"""What the planner is asked."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from offload_triforce.config import Settings, replace_settings
from offload_triforce.machine.hardware import Machine
from offload_triforce.model.outline import ModelShape
from offload_triforce.planner.choose import choose_settings


@dataclass(frozen=True)
class AutoDraft:
    """What ``auto`` took, and why.

    Attributes:
        head: whether it is the MTP head. size: bytes of that.
        with_head, with_lookup: ms per token that are predicted with either; None where it does not fit.
    """

    head: bool
    size: int
    with_head: float | None
    with_lookup: float | None


@dataclass(frozen=True)
class PlanQuery:
    """What is asked.

    Attributes:
        settings: as given so far. fixed: the names of those that are not to be chosen.
        draft: a draft model's shape. draft_kind: ngram, none, self, model or mtp.
        retrieval, drafted: acceptance, None where it is to be assumed.
        variants: the same model under other quantisations, for suggestions.
        source, draft_source: what the user called the two, as ``generate`` takes them.
        auto: how the draft was chosen, where it was left open and there is an MTP head.
    """

    model: ModelShape
    context: int
    machine: Machine
    settings: Settings
    fixed: Collection[str] = ()
    draft: ModelShape | None = None
    draft_kind: str = "ngram"
    retrieval: float | None = None
    drafted: float | None = None
    variants: tuple[ModelShape, ...] = ()
    source: str = "MODEL"
    draft_source: str = "auto"
    auto: AutoDraft | None = None

    def choose(self, model: ModelShape | None = None, context: int | None = None, **changes: Any) -> Settings:
        """Settings for this question, or for one that differs."""
        settings = replace_settings(self.settings, changes)
        fixed = {*self.fixed, *changes}
        return choose_settings(
            model or self.model,
            settings,
            context or self.context,
            self.machine,
            fixed,
            self.draft,
            self.draft_kind,
            self.retrieval,
            self.drafted,
        )
