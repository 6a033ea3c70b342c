"""Level 0 with a model: a small one drafts over a streaming cache."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from offload_triforce.cache.recurrent import OverNodes
from offload_triforce.cache.static import Held, StaticView
from offload_triforce.cache.streaming import StreamingCache
from offload_triforce.graphs.steps import StepGraphs
from offload_triforce.kernels.ops import AttentionParams
from offload_triforce.model.adapter import run
from offload_triforce.speculation.acceptance import AcceptanceRule, DraftToken
from offload_triforce.speculation.place import PathState, Place
from offload_triforce.speculation.text import TokenText


class ModelDrafter(OverNodes):
    """The model drafter: a small transformers model over a streaming cache.

    The text may hold ids that this model has no embedding for (the target's vocabulary is padded further, or holds ids
    of images). Nothing is drafted right after one; later it reads another token in its place.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: StreamingCache,
        rule: AcceptanceRule,
        graphs: StepGraphs | None = None,
        places: Mapping[int, int] | None = None,
    ) -> None:
        """``cache`` must be empty. ``rule``: how it takes a token from its logits.

        ``places``: of the model's layers that attend, in the cache; without, all layers do.
        """
        super().__init__(None if cache.recurrent is None else cache.recurrent.nodes)
        self.model, self.cache, self.rule, self.graphs, self._places = model, cache, rule, graphs, places
        self._readable = model.get_input_embeddings().num_embeddings
        self._stand_in = _stand_in(model, self._readable)
        self._read: list[int] = []  # tokens of the text that have been read or left out, from ``_first`` on
        self._first = 0

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """The view that the model attends over."""
        return self.cache.attend(layer if self._places is None else self._places[layer], query, key, value, params)

    def _room(self, text: TokenText) -> int:
        """Draft tokens that the cache can hold beside those that are in the text already."""
        return self.cache.capacity // 2 - self.cache.sink - 1 - (len(text) - text.decided)

    def offer(self, text: TokenText) -> str | None:
        """See ``Drafter``: a model can always draft, as long as there is room, and it knows the last token."""
        return "model" if self._room(text) > 0 and text[-1:][0] < self._readable else None

    def draft(self, text: TokenText, count: int, before: PathState | None = None) -> list[DraftToken]:
        """See ``Drafter``: drawn one by one."""
        start, drafted = len(text), []
        state = PathState(before)
        for _ in range(min(count, self._room(text))):
            draft_token = self.rule.draft(self._logits(text), Place(text.ids_on, len(text), state))
            if draft_token is None:
                break
            drafted.append(draft_token)
            if draft_token.token >= self._readable:
                break
            text.append([draft_token.token])
            state = PathState(state)
        text.truncate(start)
        return drafted

    def _logits(self, text: TokenText) -> Tensor:
        """Read what is unread of the text: logits after its last token, [1, V']."""
        cache = self.cache
        if cache.length:
            self._forget_but(text)
        if cache.length and len(text) - cache.text <= cache.capacity // 2:
            parts = [range(cache.text, len(text))]
        else:  # at the beginning, or when nobody has asked for so long that little of what is held would stay
            parts = cache.begin(len(text))
            self._first = text.decided - 1  # draft tokens behind it may be taken back
        ids = [token for part in parts for token in text[part.start : part.stop]]
        tokens = [token if token < self._readable else self._stand_in for token in ids]
        drafted = cache.text - (text.decided - 1)  # and the newest decided token, which may be asked about again
        cache.settle(cache.pending - min(cache.pending, max(0, drafted)))
        cache.make_room(len(tokens))
        positions = range(cache.length, cache.length + len(tokens))
        if self._states is not None:
            pending, count = cache.pending, len(tokens)
            seen = torch.ones(count, pending + count, dtype=torch.bool, device=self.model.device).tril(pending)
            self._states.begin(self._states.nodes.step(seen))
        if self.graphs is None:
            logits = run(self.model, tokens, positions, self, keep=1)
        else:
            depths = range(cache.pending, cache.pending + len(tokens))
            seen = np.tri(len(tokens), dtype=bool)
            logits = self.graphs(tokens, positions, self, 1, seen, depths)
        cache.end_step(len(tokens))
        self._read = text[self._first :]
        return logits

    def _forget_but(self, text: TokenText) -> None:
        """Forget what has been read of another text than this one, and this one's last token, which is read again."""
        now, same = text[self._first : -1], 0
        for mine, its in zip(self._read, now, strict=False):
            if mine != its:
                break
            same += 1
        self.cache.select(range(self.cache.pending - max(0, self.cache.text - self._first - same)))


def _stand_in(model: PreTrainedModel, readable: int) -> int:
    """What a model reads for ids that it does not know: the end of a text, if it knows that; else token 0."""
    ends = model.config.get_text_config().eos_token_id
    ends = ends if isinstance(ends, (list, tuple)) else [ends]
    return next((end for end in ends if end is not None and 0 <= end < readable), 0)


def static_view(cache: StreamingCache, tokens: int, places: Mapping[int, int] | None = None) -> StaticView:
    """What the draft model attends over in steps of that many tokens that are captured. ``places``: as above."""
    nodes = None if cache.recurrent is None else cache.recurrent.nodes

    def find(layer: int, _: AttentionParams) -> Held:
        return Held(None, cache, layer if places is None else places[layer])

    return StaticView([cache], find, tokens, tokens, (), nodes)
