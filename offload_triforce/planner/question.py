"""What the planner is asked."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from offload_triforce.config import Settings, replace_settings
from offload_triforce.model.shape import ModelShape
from offload_triforce.planner.choose import choose_settings
from offload_triforce.planner.machine import Machine


@dataclass(frozen=True)
class Question:
    """What is asked. ``variants``: the same model under other quantisations, for suggestions.

    ``settings`` with the names of those in ``fixed`` that are not to be chosen; ``draft_kind``: ngram, none, self or
    model; ``retrieval`` and ``drafted``: acceptance, None where it is to be assumed.
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
