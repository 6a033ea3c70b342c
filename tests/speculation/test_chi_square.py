"""The whole engine against the target's own distribution: 20,000 short texts and chi-square tests.

Prefill, caches, refresh, draft, both levels and stopping are the real ones. The model is tiny and random, its
caches so small that both levels reject often. Expected counts come from plain transformers forward passes on
every possible continuation, so only the engine's side is sampled.
"""

from __future__ import annotations

import copy
import dataclasses
import heapq
from collections import Counter

import pytest
import torch
from scipy.stats import chisquare
from transformers import LogitsProcessorList

from offload_triforce.engine import TriForce
from offload_triforce.generation.request import interpret
from offload_triforce.speculation import sampling
from offload_triforce.speculation.acceptance import Drawn
from offload_triforce.speculation.noise import Noise
from offload_triforce.speculation.stats import Acceptance
from tests.speculation.speculation_toys import tiny_llama
from tests.stateful import Counting, Forking, Moody

pytestmark = pytest.mark.filterwarnings("ignore:drafts are made without")

VOCABULARY = 6
TOKENS = 3  # compared; a fourth is asked for, so that the first pass has its full length
SMALL = {"chunk": 2, "sink": 2, "recent": 2, "tile": 16, "ring": 2, "gamma": 3, "gamma1": 2}
SMALL |= {"draft_cache": 10, "draft_sink": 0, "bits": 16, "topk": 1, "overlap": False}
# How it is decoded: TriForce's chains; trees; and all that there is, drafting ahead by a cost that is given.
CHAIN = {"rule": "resampled", "adaptive": False}
TREE = {"rule": "resampled", "adaptive": False, "topk": 2, "draft_tokens": 6, "width": 2}
ALL = {"topk": 3, "draft_tokens": 8, "width": 2, "draft_cost": 0.1, "overlap": True, "bits": 4}


def noisy(model, amount):
    """A worse copy of a model: a draft that is often right."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += amount * torch.randn(weight.shape, generator=generator)
    return model


class Setup:
    """A target, its engine and one request."""

    def __init__(self, draft, way, layers=1, budget=8, brought=None, **options):
        """``brought``: makes a logits processor of a user's, which comes first."""
        self.model = tiny_llama(seed=2, vocabulary=VOCABULARY, layers=layers, spread=0.4)
        draft = noisy(self.model, 0.2) if draft == "model" else draft
        self.engine = TriForce(self.model, draft=draft, **{**SMALL, "budget": budget, **way})
        options |= {"max_new_tokens": TOKENS + 1}
        self.request, self.brought = interpret(self.model, self._prompt(), None, None, options), brought

    def processors(self):
        """New ones, for one text."""
        return LogitsProcessorList([*([self.brought()] if self.brought else []), *self.request.processors])

    def _prompt(self):
        """60 tokens of the target's own, so that there is something to look up."""
        torch.manual_seed(4)
        return self.model.generate(torch.tensor([[1, 2]]), do_sample=True, temperature=0.7, max_new_tokens=58)

    @torch.no_grad()
    def expected(self):
        """Probability of every text of three tokens, or fewer if it ends."""
        texts, prompt = {(): 1.0}, self.request.prompt.tolist()
        for length in range(TOKENS):
            growing = [text for text in texts if len(text) == length and text[-1:] not in self._ends()]
            ids = torch.tensor([prompt + list(text) for text in growing])
            logits = self.model(ids, use_cache=False).logits[:, -1 - length :].float()
            for text, whole, rows in zip(growing, ids, logits, strict=True):
                chance, processors = texts.pop(text), self.processors()
                for end, row in enumerate(rows, len(prompt)):  # one call per token, in order
                    scores = processors(whole[None, :end], row[None].clone())
                odds = torch.softmax(scores[0], -1).tolist()
                texts |= {(*text, token): chance * p for token, p in enumerate(odds) if p > 0}
        return texts

    def _ends(self):
        return [(token,) for token in self.request.eos]

    def sample(self, count, first_seed=0):
        """Texts, and the verdicts of levels 1 and 2."""
        texts, draft, retrieval = Counter(), Acceptance(), Acceptance()
        for seed in range(first_seed, first_seed + count):
            stream = self.engine.run(dataclasses.replace(self.request, processors=self.processors()), seed)
            assert list(stream) == []  # no tokenizer, no text
            texts[tuple(stream.token_ids[:TOKENS])] += 1
            for total, one in ((draft, stream.stats.draft), (retrieval, stream.stats.retrieval)):
                total.accepted, total.judged = total.accepted + one.accepted, total.judged + one.judged
        return texts, draft, retrieval


def p_value(texts, expected):
    """Of the chi-square test. The rarest texts share bins, until every bin expects at least five."""
    impossible = set(texts) - set(expected)
    assert not impossible, f"the target cannot write {sorted(impossible)}"
    bins = [(texts.total() * chance, texts[text]) for text, chance in expected.items()]
    heapq.heapify(bins)
    while bins[0][0] < 5:
        one, other = heapq.heappop(bins), heapq.heappop(bins)
        heapq.heappush(bins, (one[0] + other[0], one[1] + other[1]))
    assert len(bins) > 5, "too few bins to see anything"
    wanted, seen = (torch.tensor(column, dtype=torch.float64).numpy() for column in zip(*bins, strict=True))
    return float(chisquare(seen, wanted * seen.sum() / wanted.sum()).pvalue)


# Texts, and what they are made with. More of them where they are cheap.
SETUPS = {
    "self": (1700, CHAIN, {"draft": "self", "temperature": 1.0}),
    "self, nucleus": (1700, CHAIN, {"draft": "self", "temperature": 0.6, "top_p": 0.9}),
    "self, penalty": (1000, TREE, {"draft": "self", "temperature": 1.0, "repetition_penalty": 1.3}),
    "self, two layers": (1000, CHAIN, {"draft": "self", "layers": 2, "temperature": 1.5, "top_p": 0.8}),
    "model": (1000, TREE, {"draft": "model", "temperature": 1.0}),
    "model, nucleus": (1600, CHAIN, {"draft": "model", "temperature": 1.5, "top_p": 0.8}),
    "model, penalty": (1000, ALL, {"draft": "model", "temperature": 0.8, "top_k": 5, "repetition_penalty": 1.3}),
    "ngram": (1500, ALL, {"draft": "ngram", "temperature": 1.0}),
    "ngram, nucleus": (3000, CHAIN, {"draft": "ngram", "temperature": 0.6, "top_p": 0.9}),
    "ngram, texts that end": (1500, TREE, {"draft": "ngram", "temperature": 1.0, "min_p": 0.05, "eos_token_id": 0}),
    "none, coupled": (1500, ALL, {"draft": "none", "temperature": 1.3, "top_p": 0.9}),
    "ngram, counts its calls": (1000, ALL, {"draft": "ngram", "temperature": 1.5, "brought": Counting}),
    "self, forks": (1000, TREE, {"draft": "self", "temperature": 1.5, "brought": Forking}),
    "model, forks": (1500, ALL, {"draft": "model", "temperature": 1.5, "brought": Forking}),
    "self, goes by earlier scores": (1500, CHAIN, {"draft": "self", "temperature": 1.0, "brought": Moody}),
    "none, ahead": (1500, {**TREE, "overlap": True, "draft_cost": 0.1}, {"draft": "none", "temperature": 1.0}),
}


# One of each drafter and of each way, and of each kind of penalty, end and state, with a fifth of the texts: a wrong
# rule shows with fewer, see below. All of them with all their texts take minutes.
USUAL = (
    "ngram, counts its calls",
    "self, forks",
    "self, penalty",
    "self, two layers",
    "ngram, texts that end",
)


@pytest.mark.parametrize(
    ("name", "share"),
    [*((name, 0.2) for name in USUAL), *(pytest.param(name, 1, marks=pytest.mark.slow) for name in SETUPS)],
)
def test_texts_have_the_targets_distribution(name, share):
    """The seeds are fixed, so a failure is a bug and not bad luck. Apart from each other, for pytest -n."""
    count, way, options = SETUPS[name]
    count, setup = int(share * count), Setup(way=way, **options)
    texts, draft, retrieval = setup.sample(count, first_seed=10_000 * list(SETUPS).index(name))
    p = p_value(texts, setup.expected())
    print(f"{name}: accepted {draft.rate} (draft), {retrieval.rate:.2f} (retrieval level); p = {p:.3f}")
    assert draft.rate is None or draft.rate < 0.9
    assert retrieval.rate < (0.97 if "topk" in way else 0.9)  # level 2 has something to put right
    assert p > 1e-4


@pytest.mark.parametrize("way", [CHAIN, TREE], ids=["chain", "tree"])
def test_a_wrong_residual_shows(monkeypatch, way):
    """The same test with fewer texts, when rejected tokens are drawn from p itself."""
    monkeypatch.setattr(sampling, "residual", lambda p, q: p)
    setup = Setup("self", way, temperature=0.6, top_p=0.9)
    assert p_value(setup.sample(170)[0], setup.expected()) < 1e-6


def test_the_same_noise_everywhere_shows(monkeypatch):
    """Each token alone would still be an exact draw; texts would not."""
    at = Noise.at
    monkeypatch.setattr(Noise, "at", lambda self, position: at(self, self._first))
    monkeypatch.setattr(Noise, "forget", lambda self, position: None)
    setup = Setup("ngram", ALL, temperature=1.0)
    assert p_value(setup.sample(120)[0], setup.expected()) < 1e-6


def test_a_wrong_residual_at_level_1_shows(monkeypatch):
    """The error of the released TriForce. Level 1 sees everything here, so the target corrects none of it."""
    candidates, residual = Drawn.token, sampling.residual

    def mutant(self, rank):
        with monkeypatch.context() as patch:
            patch.setattr(sampling, "residual", lambda p, q: p)
            return candidates(self, rank)

    setup = Setup("model", CHAIN, temperature=1.5, top_p=0.8, budget=64)
    expected = setup.expected()
    texts, draft, retrieval = setup.sample(200)
    assert retrieval.rate > 0.99
    assert draft.rate < 0.9
    assert p_value(texts, expected) > 1e-4
    monkeypatch.setattr(Drawn, "token", mutant)
    assert p_value(setup.sample(200)[0], expected) < 1e-6
    assert sampling.residual is residual
