"""What ``auto`` means on a card: the checkpoint's MTP head where it makes answers faster, else look-up alone.

A head takes memory (0.85 GB for a 27B) that may be all that a retrieval cache has: so both are predicted.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from offload_triforce.config import Settings
from offload_triforce.planner.choose import on_loaded_card
from offload_triforce.planner.query import AutoDraft, PlanQuery
from offload_triforce.planner.report import best_ms

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from offload_triforce.model.outline import ModelLayout


def choose_draft(question: PlanQuery) -> PlanQuery:
    """The question with the drafter that ``auto`` takes for it. ``question``: with the MTP head, if there is one."""
    if question.draft_kind != "mtp":
        return question
    lookup = replace(question, draft=None, draft_kind="ngram")
    with_head, with_lookup = best_ms(question), best_ms(lookup)
    pays = with_lookup is None or (with_head is not None and with_head <= with_lookup)
    return replace(
        question if pays else lookup, auto=AutoDraft(pays, question.draft.weights.total, with_head, with_lookup)
    )


def head_pays(model: PreTrainedModel, layout: ModelLayout, settings: Settings, context: int) -> bool:
    """The same for a model that lies on a card already, and its head not yet. True where nothing is known of the head.

    ``context``: tokens of prompt and answer.
    """
    from offload_triforce.model.mtp_files import blank_head  # these import transformers, which is there then
    from offload_triforce.model.shape import shape_of_loaded
    from offload_triforce.model.weights import count_head

    layers, shape = blank_head(model), shape_of_loaded(model, layout)
    if layers is None or (head := replace(shape, mtp=count_head(layers, model)).mtp_head) is None:
        return True
    machine, fixed = on_loaded_card(shape, settings)
    return choose_draft(PlanQuery(shape, context, machine, settings, fixed, head, "mtp")).draft is not None
