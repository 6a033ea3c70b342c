"""Texts of one engine that are asked about in turns: whatever happened before, each answer is a fresh engine's."""

from __future__ import annotations

import contextlib
from functools import cache

import torch

from offload_triforce import TriForce
from tests.tiny import VOCABULARY, tiny_model

FAMILIES = ("llama", "gemma3", "qwen3.5", "qwen3-moe")
SMALL = {"budget": 64, "chunk": 4, "sink": 4, "recent": 8, "tile": 8, "gamma": 6, "draft_tokens": 16}
CONTEXT = 320
HOW = {**SMALL, "prefill_chunk": 16, "context": CONTEXT, "link_gbps": 1000.0}  # a link whose bytes are counted


@cache
def model_of(family):
    return tiny_model(family, seed=1, calm=True)


@cache
def fresh(family, prompt, temperature, seed, new):
    """Plain decoding of an engine that has never read anything."""
    how = {**HOW, "gamma": 0, "draft_tokens": None}
    with TriForce(model_of(family), draft="none", reuse=False, **how) as engine:
        options = {"max_new_tokens": new, "temperature": temperature, "seed": seed}
        return engine.generate(list(prompt), **options).token_ids


def draw_ids(seed, count):
    chance = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(2, VOCABULARY, (count,), generator=chance).tolist())


KEEPS = {
    "all": lambda n: n,
    "but one": lambda n: n - 1,
    "but few": lambda n: n - 7,
    "half": lambda n: n // 2,
    "little": lambda n: 6,
}


class Desk:
    """Some texts of one engine, its own session each but for the last, which goes on with whatever it finds."""

    def __init__(self, family, engine):
        self.family, self.engine = family, engine
        self.sessions = [engine.session(), engine.session(), None]
        self.texts = [draw_ids(100 + i, 30) for i in range(3)]
        self.count = 0

    def ask(self, which, keep, more, new, temperature, **options):
        """An answer to what is kept of a text and something new."""
        self.count += 1
        text = self.texts[which]
        prompt = text[: max(1, keep(len(text)))] + draw_ids(self.count, more)
        prompt = prompt[: CONTEXT - new]
        given = {"max_new_tokens": new, "temperature": temperature, "seed": self.count}
        result = self.engine.generate(list(prompt), session=self.sessions[which], **given, **options)
        assert result.token_ids == fresh(self.family, prompt, temperature, self.count, new)
        self.texts[which] = prompt + tuple(result.token_ids)
        assert result.stats.prompt_tokens == len(prompt)
        return result

    def interrupt(self, which, more, after):
        """A question that is given up while it is read, or answered."""
        prompt = (self.texts[which] + draw_ids(self.count, more))[: CONTEXT - 20]
        steps = []

        def stop(done, total):
            steps.append(done)
            if len(steps) > after:
                raise KeyboardInterrupt

        stream = self.engine.stream(list(prompt), session=self.sessions[which], progress=stop, max_new_tokens=20)
        with contextlib.suppress(KeyboardInterrupt):
            next(iter(stream), None)
        stream.close()
        self.texts[which] = prompt
