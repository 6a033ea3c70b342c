"""A tiny hybrid over its real levels and caches, decoded from one prompt once for every outcome of chance.

The model is transformers' own and remembers: what it says depends on all that it has read. So that sums are exact in
float32, samplers read its logits in coarse steps. Two ways of computing the same logits then agree to the last bit,
and two that read different texts do not.
"""

from __future__ import annotations

import itertools

import torch

from offload_triforce.config import Settings
from offload_triforce.model.adapter import attached
from offload_triforce.model.layout import probe
from offload_triforce.runtime.drafters import Drafters
from offload_triforce.runtime.runtime import Runtime
from offload_triforce.runtime.session import Session
from offload_triforce.speculation.hierarchy import decode
from offload_triforce.speculation.stats import DecodeStats
from offload_triforce.speculation.text import TokenText
from tests.scheduler.devices import LateDevice
from tests.speculation.toys import VOCABULARY, Scores
from tests.tiny import build

GRID, CUT = 1 / 16, 2.0  # steps of logits, as samplers read them, and how far behind the best one they are cut off
PROMPT = [0, 1, 1, 2, 0, 2, 2, 1, 0, 0, 1, 2]
SMALL = {"chunk": 2, "sink": 2, "recent": 2, "budget": 6, "tile": 2, "bits": 16, "draft_cache": 24, "draft_sink": 2}
SMALL |= {"adaptive": False, "draft_cost": 0.01, "gamma1": 0, "prefill_chunk": 5}
# More than these tokens are in its vocabulary (what probes a model reads some), but it says no others.
SHAPE = {
    "vocab_size": 8,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "initializer_range": 0.4,
    "bos_token_id": None,
}
NOISES = 4  # that coupled acceptance is enumerated over, at each place


def coarse(logits):
    """Logits [n, V] as samplers read them: in steps, and without what is unlikely, as after top-p."""
    steps = (logits[:, :VOCABULARY].double() / GRID).round() * GRID
    return steps.masked_fill(steps < steps.amax(1, keepdim=True) - CUT, -torch.inf)


class CoarseScores(Scores):
    """Stands in for the sampler, see above."""

    def tell_drafts(self, logits, places, tell):
        return super().tell_drafts(coarse(logits), places, tell)

    def survey(self, logits, tell):
        return super().survey(coarse(logits), tell)

    def target_scores(self, logits, place):
        return coarse(logits)


class FewNoises:
    """Noise for coupled acceptance that is one of ``NOISES`` at each place, by choice."""

    rows = torch.rand(NOISES, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(6)).log_()
    rows = -(-rows).log() / 2  # half as strong: so that it matters what the logits are

    def __init__(self, choices):
        self._choices, self._taken = choices, {}

    def at(self, position):
        if position not in self._taken:
            self._taken[position] = self._choices.draw(torch.full((NOISES,), 1 / NOISES, dtype=torch.float64))
        return self.rows[self._taken[position]]

    def forget(self, position):
        pass


class HybridCase:
    """Answers of ``tokens`` tokens, of which more could have come: ``more``. ``settings``: beside SMALL.

    ``rows``: whether to ask for the target's own logits after each text that there can be.
    """

    def __init__(self, tokens=2, more=0, draft="none", seed=0, rows=True, **settings):
        self.tokens, self.more = tokens, more
        self.settings = Settings(**{**SMALL, **settings})
        self.model = build("Qwen3_5", seed, **SHAPE)
        with torch.no_grad():  # so that it matters what the retrieval level does not see
            self.model.model.layers[1].self_attn.o_proj.weight *= 3
            for layer in (0, 2):  # and what its states are
                self.model.model.layers[layer].linear_attn.out_proj.weight *= 2
        self.layout = probe(self.model)
        limit = len(PROMPT) + tokens + more + 1
        self.runtime = Runtime(self.model, self.layout, self.settings, limit, device=LateDevice())
        self.drafters = Drafters(draft, self.model, self.layout, None, None, self.settings)
        self.rows = self._own_rows() if rows else {}
        with attached(self.model), torch.no_grad():
            self.session = Session(self.runtime)
            self.session.begin(torch.tensor(PROMPT[:-1]))
            self.start = self.runtime.caches.snapshot()

    @torch.no_grad()
    def _own_rows(self):
        """Transformers' own logits [1, V] after each text there can be, without any of our caches."""
        texts = [t for n in range(self.tokens) for t in itertools.product(range(VOCABULARY), repeat=n)]
        return {text: self.model(torch.tensor([[*PROMPT, *text]]), use_cache=False).logits[0, -1:] for text in texts}

    @property
    def margin(self):
        """How near the nearest of the target's logits is to where the steps of samplers change."""
        steps = torch.cat(list(self.rows.values()))[:, :VOCABULARY].double() / GRID
        return float(GRID * (0.5 - (steps - steps.round()).abs()).min())

    def run(self, rule):
        """One answer: its tokens, and what was counted."""
        caches, limit = self.runtime.caches, self.tokens + self.more
        caches.restore(self.start)
        text, stats, out = TokenText(torch.tensor(PROMPT), len(PROMPT) + limit + 1), DecodeStats(), []
        with attached(self.model), torch.no_grad():
            drafters = self.drafters.make(rule, None)
            target, tree_drafter = self.runtime.levels(drafters, rule, stats, lambda token: False)
            for new in decode(target, tree_drafter, rule, text, limit, stats, self._stop):
                out += new
        return tuple(out), stats

    def _stop(self, text):
        return len(text) == len(PROMPT) + self.tokens

    def plain(self, noise):
        """The target alone, token by token."""
        out = ()
        while len(out) < self.tokens:
            out += (int((coarse(self.rows[out])[0] + noise.at(len(PROMPT) + len(out))).argmax()),)
        return out

    def expected(self, drawn):
        """The target alone: probability of each answer; where it is not ``drawn``, by the noises that there are."""
        total = {}
        for out in itertools.product(range(VOCABULARY), repeat=self.tokens):
            total[out] = 1.0
            for length, token in enumerate(out):
                scores = coarse(self.rows[out[:length]])[0]
                taken = (scores + FewNoises.rows).argmax(1)
                row = scores.softmax(0) if drawn else torch.bincount(taken, minlength=VOCABULARY).double() / NOISES
                total[out] *= float(row[token])
        return total

    def close(self):
        self.runtime.close()
