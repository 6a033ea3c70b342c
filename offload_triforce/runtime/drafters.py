"""The drafters, level 0: from what the user names to drafters that are ready to work."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offload_triforce.cache.recurrent import RecurrentCache
from offload_triforce.cache.streaming import StreamingCache
from offload_triforce.config import Settings
from offload_triforce.errors import InputError
from offload_triforce.graphs.steps import StepGraphs, make_graphs
from offload_triforce.model.layout import ModelLayout, probe
from offload_triforce.model.rotary import KeyTurner
from offload_triforce.planner.sizes import draft_bytes
from offload_triforce.runtime.model_drafter import ModelDrafter, static_view
from offload_triforce.speculation.acceptance import AcceptanceRule
from offload_triforce.speculation.draft_selector import Drafter
from offload_triforce.speculation.ngram import NgramDrafter

# "ngram", "self", "none", a loaded model, or look-up and a model together: "ngram+self", ("ngram", model).
DraftChoice = PreTrainedModel | str | Sequence[PreTrainedModel | str] | None


class Drafters:
    """The drafters of one target. What a draft model works with is made when it is first needed."""

    def __init__(
        self,
        chosen: DraftChoice,
        target: PreTrainedModel,
        layout: ModelLayout,
        tokenizer: PreTrainedTokenizerBase | None,
        draft_tokenizer: PreTrainedTokenizerBase | None,
        settings: Settings,
    ) -> None:
        """See ``TriForce``.

        Raises:
            InputError: not a draft, or one that does not fit the target.
        """
        # What the target can say, and read again.
        self._vocabulary = min(layout.vocabulary, target.get_input_embeddings().num_embeddings)
        self.settings = settings
        parts = _parts(chosen)
        models = [target if part == "self" else part for part in parts if part != "ngram"]
        if len(models) > 1 or len(parts) - len(models) > 1:
            raise InputError("of drafts, look-up and one model can work together, not more")
        self.lookup = len(parts) > len(models)
        self.model = models[0] if models else None
        self._small: tuple[StreamingCache, StepGraphs | None] | None = None
        if self.model is not None:
            self._layout = layout if self.model is target else probe(self.model)
            check_same_tokens(target, tokenizer, self.model, draft_tokenizer, settings.same_tokens)
            check_draft(self._layout, layout, settings)
            self._turner = KeyTurner(self.model)
            attending = sorted([*self._layout.full, *self._layout.sliding])
            self._places = {layer: place for place, layer in enumerate(attending)}

    @property
    def bytes_to_come(self) -> int:
        """Bytes on the device that a draft model's cache is yet to take."""
        if self.model is None or self._small is not None:
            return 0
        return draft_bytes(self._layout, self.settings.draft_cache)

    def make(self, rule: AcceptanceRule) -> list[Drafter]:
        """Drafters for a new text, those to be asked first first."""
        drafts: list[Drafter] = [NgramDrafter(self._vocabulary)] if self.lookup else []
        if self.model is not None:
            cache, graphs = self.small()
            cache.reset()
            drafts.append(ModelDrafter(self.model, cache, rule, graphs, self._places))
        return drafts

    def small(self) -> tuple[StreamingCache, StepGraphs | None]:
        """What the draft model works with."""
        if self._small is None:
            with torch.inference_mode(False):
                self._small = self._make_small()
        return self._small

    def _make_small(self) -> tuple[StreamingCache, StepGraphs | None]:
        settings, layout, shape = self.settings, self._layout, self._layout.attention[0]
        where, recurrent = (layout.dtype, layout.device), None
        if layout.recurrent:
            size = layout.layers[layout.recurrent[0]]
            recurrent = RecurrentCache(len(layout.recurrent), size, settings.draft_cache, 0, *where)
        cache = StreamingCache(
            len(layout.attention),
            shape.kv_heads,
            shape.head_dim,
            settings.draft_cache,
            settings.draft_sink,
            self._turner.turn,
            *where,
            recurrent,
        )
        if not settings.graphs:
            return cache, None
        return cache, make_graphs(
            self.model, layout, partial(static_view, cache, places=self._places), settings.gamma1 + 1
        )

    def close(self) -> None:
        """Give the cache back."""
        self._small = None


def _parts(chosen: DraftChoice) -> list[PreTrainedModel | str]:
    if chosen is None or (isinstance(chosen, str) and chosen == "none"):
        return []
    if isinstance(chosen, str):
        parts: list[PreTrainedModel | str] = list(chosen.split("+"))
    else:
        parts = list(chosen) if isinstance(chosen, (list, tuple)) else [chosen]
    for part in parts:
        if not isinstance(part, PreTrainedModel) and part not in ("ngram", "self"):
            raise InputError(f"unknown draft {chosen!r}; use a loaded model, 'ngram', 'self', 'ngram+self' or 'none'")
    return parts


def check_same_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    draft: PreTrainedModel,
    draft_tokenizer: PreTrainedTokenizerBase | None,
    told: bool = False,
) -> None:
    """A draft has to speak the target's tokens. Their tokenizers show it; without them, vocabularies of one size do.

    ``told``: the user says so.

    Raises:
        InputError: says how the two differ.
    """
    if told:
        return
    if tokenizer is not None and draft_tokenizer is not None:
        ours, theirs = tokenizer.get_vocab(), draft_tokenizer.get_vocab()
        differing = sum(theirs.get(token) != number for token, number in ours.items())
        if differing or len(ours) != len(theirs):
            raise InputError(
                f"the draft's tokenizer is not the target's: {max(differing, abs(len(ours) - len(theirs))):,} of "
                f"{len(ours):,} tokens differ; take a draft of the same model family, or draft 'ngram', or set "
                "same_tokens=True if these are few and rare"
            )
        return
    sizes = [m.get_input_embeddings().num_embeddings for m in (model, draft)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"the draft's vocabulary of {sizes[1]:,} tokens is not the target's of {sizes[0]:,}; take a draft of the "
            "same model family, or draft 'ngram', or set same_tokens=True if only their padding differs"
        )


def check_draft(layout: ModelLayout, target: ModelLayout, settings: Settings) -> None:
    """A draft model has to fit its streaming cache.

    Raises:
        InputError: why it does not.
    """
    least = 2 * (settings.draft_sink + settings.gamma1 + 2)
    if settings.draft_cache < least:
        raise InputError(
            f"draft_cache {settings.draft_cache} is too small for gamma1 {settings.gamma1}; use at least {least}"
        )
    if layout.device != target.device:
        raise InputError(f"the draft is on {layout.device} and the target on {target.device}; put both on one device")
    if layout.max_positions is not None and settings.draft_cache > layout.max_positions:
        raise InputError(
            f"draft_cache {settings.draft_cache} exceeds the draft model's {layout.max_positions} positions; "
            f"set it to {layout.max_positions} or less"
        )
    if len({(s.kv_heads, s.head_dim) for s in layout.attention}) > 1:
        raise InputError("the layers of the draft model differ in KV heads or head dimension; take another draft")
