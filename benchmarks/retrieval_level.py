"""A text that is gone through with everything in sight, and levels that see a chosen part of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.retrieval_ways import Asking, Way, best, chunk_scores
from offload_triforce.cache.chunks import make_store
from offload_triforce.cache.retrieval import ALWAYS, MOST_CHUNKS
from offload_triforce.errors import InputError
from offload_triforce.kernels import ops
from offload_triforce.model.adapter import run
from offload_triforce.model.layout import ModelLayout
from offload_triforce.runtime.reading import Reading


def attention_shares(query: Tensor, key: Tensor, params: ops.AttentionParams) -> tuple[Tensor, Tensor]:
    """Softmax of the newest T of n tokens over all n.

    Args:
        query: [H, T, D]. key: [K, n, D].

    Returns:
        Weights, float32 [K, G*T, n], and their mean over the queries of a KV head, [K, n].
    """
    tokens = query.shape[1]
    scores = ops.pack_queries(query, key.shape[0]).float() @ key.float().mT * params.scaling
    if params.softcap is not None:
        scores = params.softcap * torch.tanh(scores / params.softcap)
    mask = ops.causal_mask(tokens, key.shape[1], device=key.device)
    weights = scores.masked_fill_(~mask.repeat(scores.shape[1] // tokens, 1), float("-inf")).softmax(2)
    return weights, weights.mean(1)


class FullText:
    """The target over a text of which all is there: a view of plain torch.

    Attributes:
        kv: of each layer, [2, K, room, D]; the first ``length`` tokens count. prompt: as many as were read at first.
        shares: of each layer, how the newest step's attention is spread over the text, [K, length].
        asking: what the newest step leaves for a choice.
    """

    def __init__(self, model: PreTrainedModel, layout: ModelLayout, reading: Reading, room: int) -> None:
        """``room``: tokens that may follow what was read.

        Raises:
            InputError: the model has layers with a sliding window; those have nothing to choose.
        """
        others = len(layout.layers) - len(layout.full)
        if others:
            raise InputError(
                f"{others} of the model's {len(layout.layers)} layers have a sliding window or a recurrent state; only "
                "models that attend to everything in all layers can be measured"
            )
        self.model, self.prompt = model, len(reading.tokens)
        self.length, self.kv, self.params = self.prompt, [], [params for _, _, params in reading.layers]
        for kv, _, _ in reading.layers:
            whole = kv.new_empty(2, kv.shape[1], self.prompt + room, kv.shape[3], device=layout.device)
            whole[:, :, : self.prompt] = kv
            self.kv.append(whole)
        self._asked: list[Tensor] = []  # of the step under way: its queries so far, and their shares
        self._shares: list[Tensor] = []
        queries = [asked for _, asked, _ in reading.layers]
        self.asking = Asking(queries, self.prompt, self.prompt)
        keys = [kv[0, :, : self.prompt] for kv in self.kv]
        self.shares = [attention_shares(*layer)[1] for layer in zip(queries, keys, self.params, strict=True)]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: ops.AttentionParams) -> Tensor:
        """The view that the model attends over."""
        end = self.length + query.shape[1]
        self.kv[layer][0, :, self.length : end], self.kv[layer][1, :, self.length : end] = key, value
        weights, shares = attention_shares(query, self.kv[layer][0, :, :end], params)
        self._asked.append(query)
        self._shares.append(shares)
        output = weights @ self.kv[layer][1, :, :end].float()
        return output.reshape(query.shape).to(query.dtype)

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Read the next T tokens: the logits after each, [T, V]. They become part of the text."""
        self._asked, self._shares = [], []
        begin, end = self.length, self.length + len(tokens)
        logits = run(self.model, tokens, range(begin, end), self, keep=len(tokens))
        self.length, self.shares = end, self._shares
        self.asking = Asking(self._asked, end, begin)
        return logits

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Forget afterwards what is read inside."""
        before = self.length, self.shares, self.asking
        yield
        self.length, self.shares, self.asking = before


class ChosenLevel:
    """Level 1 over a text, by one way to choose: sink, chosen chunks, recent window, and the step's own tokens."""

    def __init__(self, way: Way, text: FullText) -> None:
        """Make the first choice, from the prompt."""
        self.way, self.text = way, text
        first = text.kv[0]
        self.slots = layer_slots(way, text)
        store = (len(text.kv), first.shape[1], max(self.slots), way.shape.chunk, first.shape[3], way.shape.bits)
        self.store = make_store(*store, first.dtype, first.device)
        for layer, kv in enumerate(text.kv):
            self.store.calibrate(layer, kv[0, :, : text.prompt])
        # Chunk numbers of each layer, [K, slots in use].
        self.chosen: list[Tensor] = [torch.empty(0)] * len(text.kv)
        self._first: list[Tensor] = []  # scores of a choice that is made once
        self._recent = 0  # where the recent window begins
        self._begin = text.length  # where it ends, and the step's own tokens begin
        self.choose(text.asking)

    def choose(self, asking: Asking) -> None:
        """A new choice. If it is made once, chunks newer than it knew take the place of the least wanted, and in the
        end of the older of their own: so does ``RetrievalCache``.
        """
        shape, text = self.way.shape, self.text
        pool = shape.pool(asking.refreshed)
        self._recent = shape.recent_start(asking.refreshed)
        whole = text.length // shape.chunk * shape.chunk
        for layer, kv in enumerate(text.kv):
            scores = self._scores(layer, asking)
            self.chosen[layer] = best(scores, self.slots[layer]) + pool.start
            source = torch.full((kv.shape[1], max(self.slots)), -1, dtype=torch.long, device=kv.device)
            source[:, : self.chosen[layer].shape[1]] = self.chosen[layer]
            ops.put_chunks(source, kv[:, :, :whole], self.store.slots(layer))

    def _scores(self, layer: int, asking: Asking) -> Tensor:
        """Of all chunks that may be chosen, [K, C]."""
        if layer < len(self._first):
            known = self._first[layer]
            pool = self.way.shape.pool(asking.refreshed)
            newer = torch.arange(known.shape[1], len(pool), device=known.device) / MOST_CHUNKS
            return torch.cat([known, (ALWAYS * (1 + newer)).float().expand(len(known), -1)], dim=1)
        keys, scaling = self.text.kv[layer][0, :, : asking.end], self.text.params[layer].scaling
        scores = chunk_scores(self.way, asking.queries[layer], keys, scaling, asking.refreshed)
        if self.way.when == "once":
            self._first.append(scores)
        return scores

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: ops.AttentionParams) -> Tensor:
        """The view that the model attends over."""
        kv, attention, filled = self.text.kv[layer], ops.RunningAttention(), self.chosen[layer].shape[1]
        attention.start(query, key.shape[0], params)
        if filled:
            self.store.attend_on(attention, layer, filled)
        own = torch.stack([key, value])
        sink = self.way.shape.sink if self._recent else 0
        near = torch.cat([kv[:, :, :sink], kv[:, :, self._recent : self._begin], own], dim=2)
        attention.update(near[0], near[1], ops.own_tokens(query.shape[1], query.device))
        return attention.finish()

    def step(self, tokens: Sequence[int], begin: int) -> Tensor:
        """Read T tokens behind the text's first ``begin``: the logits after each, [T, V]. None of them is kept."""
        self._begin = begin
        return run(self.text.model, tokens, range(begin, begin + len(tokens)), self, keep=len(tokens))

    def mass(self) -> float:
        """How much of the text's newest step's attention falls on what is held: mean over layers, heads, queries."""
        held = [self._held(layer, shares) for layer, shares in enumerate(self.text.shares)]
        return float(torch.stack(held).mean())

    def _held(self, layer: int, shares: Tensor) -> Tensor:
        chunk = self.way.shape.chunk
        if not self._recent:
            return shares.sum(1).mean()
        pool = shares[:, : self._recent].unflatten(1, (-1, chunk)).sum(2)
        near = shares[:, : self.way.shape.sink].sum(1) + shares[:, self._recent :].sum(1)
        return (near + pool.gather(1, self.chosen[layer]).sum(1)).mean()


def layer_slots(way: Way, text: FullText) -> list[int]:
    """How many chunks each layer chooses per KV head, told from the prompt alone. All together, as many as alike."""
    shape, layers = way.shape, len(text.kv)
    pool = shape.pool(text.prompt)
    if way.layers == "alike" or not len(pool):
        return [shape.slots] * layers
    span = slice(pool.start * shape.chunk, pool.stop * shape.chunk)
    chunks = [shares[:, span].unflatten(1, (-1, shape.chunk)).sum(2) for shares in text.shares]  # [K, C]
    if way.layers == "gain":
        ordered = torch.stack([mass.sort(1, descending=True).values.mean(0) for mass in chunks])
        return largest_gains(ordered.double(), shape.slots * layers)
    needs = []
    for layer, mass in enumerate(chunks):
        keys, scaling = text.kv[layer][0, :, : text.prompt], text.params[layer].scaling
        scores = chunk_scores(way, text.asking.queries[layer], keys, scaling, text.prompt)
        held = mass.gather(1, best(scores, shape.slots)).sum(1)
        needs.append(float((mass.sum(1) - held).mean()))
    return apportion(needs, shape.slots * layers, len(pool))


def apportion(needs: Sequence[float], total: int, most: int) -> list[int]:
    """Share ``total`` slots out in proportion to ``needs``, to each from 1 to ``most``; one by one, to whoever has the
    least for its need. What nobody can use is shared out all the same, so that the total holds.
    """
    slots = [1] * len(needs)
    for _ in range(total - len(needs)):
        open_ = [i for i, have in enumerate(slots) if have < most] or range(len(needs))
        slots[max(open_, key=lambda i: (needs[i] / slots[i], -slots[i]))] += 1
    return slots


def largest_gains(gains: Tensor, total: int) -> list[int]:
    """How many of the largest ``total`` of ``gains`` [layers, C], which fall along each row, lie in each row.

    Each row has at least one. What no row can use is shared out all the same.
    """
    layers, most = gains.shape
    wanted = gains.clone()
    wanted[:, 0] = float("inf")
    order = wanted.flatten().sort(descending=True, stable=True).indices[:total]
    slots = torch.bincount(order // most, minlength=layers).tolist()
    for extra in range(total - sum(slots)):
        slots[extra % layers] += 1
    return slots
