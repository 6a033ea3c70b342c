"""What the target is asked, and what comes out where somebody's own code stops it."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import LogitsProcessorList

from offload_triforce.speculation.acceptance import Coupled, Resampled
from offload_triforce.speculation.noise import Noise
from offload_triforce.speculation.sampling import RandomChoices, Sampler
from tests.speculation.toys import EOS, PROMPT, Case, Turns, real_sampler

CPU = torch.device("cpu")
WIDE = {"draft": "sampled", "gamma": 5, "gamma1": 2, "nodes": 12, "topk": 3, "width": 3, "tokens": 12}
WIDE |= {"likeness": 0.95, "spare": 2}


def rules(sampler, seed):
    return [Coupled(sampler, Noise(seed, len(PROMPT), 3, CPU)), Resampled(sampler, RandomChoices(seed, CPU))]


@pytest.mark.parametrize("kind", [0, 1], ids=["coupled", "resampled"])
def test_the_target_is_asked_about_the_text_alone(kind):
    """Once about each place, in order, and not about what was drafted behind an end, however much of it was right."""
    behind = 0
    for seed in range(25):
        sampler = real_sampler("unknown")
        out, stats = Case(**WIDE, seed=seed).run(rules(sampler, seed)[kind])
        ids = [*PROMPT.tolist(), *out]
        assert sampler._processors[0].seen == [ids[:length] for length in range(len(PROMPT), len(ids))]
        assert stats.retrieval.accepted <= len(out)
        behind += out[-1] == EOS
    assert behind > 5


class Failing(Turns):
    """Raises at its n-th call."""

    def __init__(self, fatal):
        super().__init__()
        self.fatal = fatal

    def __call__(self, input_ids, scores):
        if self.calls == self.fatal:
            raise ZeroDivisionError
        return super().__call__(input_ids, scores)


@pytest.mark.parametrize("kind", [0, 1], ids=["coupled", "resampled"])
def test_what_came_before_an_error_comes_out_first(monkeypatch, kind):
    """With transformers, a streamer would have had it too."""
    given, several = [], False
    stop = Case.stop

    def noting(self, text):
        given.append(text[len(PROMPT) :])
        return stop(self, text)

    monkeypatch.setattr(Case, "stop", noting)
    for fatal, seed in itertools.product(range(6), range(4)):
        case = Case(**WIDE, seed=seed, endless=True)
        whole, _ = case.run(rules(Sampler(LogitsProcessorList([Failing(99)]), True, 3), seed)[kind])
        rule = rules(Sampler(LogitsProcessorList([Failing(fatal)]), True, 3), seed)[kind]
        given.clear()
        out = []
        with pytest.raises(ZeroDivisionError):
            Case(**WIDE, seed=seed, endless=True).run(rule, out)
        assert len(out) == fatal
        if kind == 0:  # the other rule's draws come in another order where less is drafted
            assert out == list(whole[:fatal])
        assert given == [out[:length] for length in range(1, fatal + 1)]
        several |= fatal > 1
    assert several
