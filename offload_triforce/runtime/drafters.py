"""The drafters, level 0: from what the user names to drafters that are ready to work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offload_triforce.cache.hidden import HiddenWindow
from offload_triforce.cache.recurrent import RecurrentCache
from offload_triforce.cache.streaming import StreamingCache
from offload_triforce.config import Settings
from offload_triforce.errors import InputError, TriForceError
from offload_triforce.graphs.steps import StepGraphs, make_graphs
from offload_triforce.model.fetch import check_source, draft_model, find_source
from offload_triforce.model.layout import ModelLayout, probe
from offload_triforce.model.local_files import find_gguf
from offload_triforce.model.mtp import MtpHead
from offload_triforce.model.mtp_files import check_head, forget_head, load_head
from offload_triforce.model.rotary import KeyTurner
from offload_triforce.planner.drafting import head_pays
from offload_triforce.planner.sizes import draft_bytes, hidden_bytes
from offload_triforce.runtime.model_drafter import ModelDrafter, static_view
from offload_triforce.runtime.mtp_drafter import MtpDrafter
from offload_triforce.speculation.acceptance import AcceptanceRule
from offload_triforce.speculation.draft_selector import Drafter
from offload_triforce.speculation.ngram import NgramDrafter

# "auto", "ngram", "mtp", "self", "none", a loaded model, or look-up and one of these together: "ngram+self",
# ("ngram", model).
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
        self.head: MtpHead | None = None
        self._target, self._target_layout, self._open = target, layout, False
        self._small: tuple[StreamingCache, StepGraphs | None] | None = None
        if models == ["auto"]:
            self.lookup, models = True, []
            # On a card the head's memory is the retrieval cache's: without a longest text, each size of caches decides.
            self._open = layout.device.type == "cuda" and settings.context is None
            if not self._open:
                self._take(_head_of(target, layout, settings))
        elif models == ["mtp"]:
            self._take(load_head(target))
            models = []
        self.model = models[0] if models else None
        if self.model is not None:
            self._layout = layout if self.model is target else probe(self.model)
            check_same_tokens(target, tokenizer, self.model, draft_tokenizer, settings.same_tokens)
            check_draft(self._layout, layout, settings)
            self._turner = KeyTurner(self.model)
            attending = sorted([*self._layout.full, *self._layout.sliding])
            self._places = {layer: place for place, layer in enumerate(attending)}

    def settle(self, context: int) -> None:
        """Before caches for ``context`` tokens are made: whether the target's head serves, where that is open yet."""
        if not self._open:
            return
        self.close()
        if self.head is not None:  # what it takes has to count as free
            self.head = None
            del self._turner  # it holds the head as well
            forget_head(self._target)
            torch.cuda.empty_cache()
        self._take(_head_of(self._target, self._target_layout, replace(self.settings, context=context)))

    def _take(self, head: MtpHead | None) -> None:
        if head is not None:
            layout = head_layout(head, self._target_layout)
            check_draft(layout, self._target_layout, self.settings)
            self._turner = KeyTurner(self._target, head)
            self._layout = layout
        self.head = head  # last: what was refused is not there

    @property
    def module(self) -> PreTrainedModel | None:
        """What is run beside the target: a draft model, or the target's MTP head."""
        return self.model if self.head is None else self.head.module

    @property
    def bytes_to_come(self) -> int:
        """Bytes on the device that a drafter's cache is yet to take."""
        if self.module is None or self._small is not None:
            return 0
        width = 0 if self.head is None else self.head.width
        return draft_bytes(self._layout, self.settings.draft_cache) + hidden_bytes(self._layout, self.settings, width)

    def make(self, rule: AcceptanceRule, hidden: HiddenWindow | None) -> list[Drafter]:
        """Drafters for a new text, those to be asked first first. ``hidden``: of the target's caches."""
        drafts: list[Drafter] = [NgramDrafter(self._vocabulary)] if self.lookup else []
        if self.head is not None and hidden is not None:
            cache, _ = self.small()
            cache.reset()
            drafts.append(MtpDrafter(self.head, cache, hidden, rule))
        elif self.model is not None:
            cache, graphs = self.small()
            cache.reset()
            drafts.append(ModelDrafter(self.model, cache, rule, graphs, self._places))
        return drafts

    def small(self) -> tuple[StreamingCache, StepGraphs | None]:
        """What the draft model or the MTP head works with."""
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
        if self.head is not None or not settings.graphs:
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
        if not isinstance(part, PreTrainedModel) and part not in ("auto", "ngram", "mtp", "self"):
            raise InputError(
                f"unknown draft {chosen!r}; use a loaded model, 'auto', 'ngram', 'mtp', 'self', 'ngram+self', "
                "'mtp+ngram' or 'none'"
            )
    return parts


def check_named(draft: str, model: str) -> str | None:
    """Refuse a draft that cannot be had, before any weights are read. Returns the model that it names, if it does.

    ``model``: the target, whose MTP head may be meant.

    Raises:
        InputError, UnsupportedModelError: why not.
    """
    small = draft_model(draft)
    if small is not None:
        check_source(small)
        find_gguf(small)
    elif "mtp" in draft.split("+"):
        check_head(find_source(model))
    return small


def _head_of(target: PreTrainedModel, layout: ModelLayout, settings: Settings) -> MtpHead | None:
    """The target's MTP head, where it has one that can be run here, that would be asked, and that pays.

    On a card whose memory it would take from the retrieval cache of the longest text, it is not read.
    """
    if settings.gamma == 0 or settings.gamma1 == 0 or settings.draft_cache < least_draft_cache(settings):
        return None
    longest = settings.context
    try:
        if layout.device.type == "cuda" and longest and not head_pays(target, layout, settings, longest):
            return None
        return load_head(target)
    except TriForceError:
        return None


def head_layout(head: MtpHead, target: ModelLayout) -> ModelLayout:
    """The one layer of an MTP head, as a model's."""
    return replace(target, layers=(head.shape,))


def least_draft_cache(settings: Settings) -> int:
    """Tokens that a streaming cache has to hold at least."""
    return 2 * (settings.draft_sink + settings.gamma1 + 2)


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
    least = least_draft_cache(settings)
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
