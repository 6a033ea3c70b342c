"""Exactness by enumeration: the real hierarchy, run once for every outcome of every accept and every draw.

The levels are toys with fixed random distributions; what judges, accepts, resamples, counts and cuts is the
code under test. No sampling error: the output distribution is summed up exactly and compared to the target's.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from speculation_toys import distribution_of, walks

from offload_triforce.speculation import hierarchy
from offload_triforce.speculation.hierarchy import Middle, decode
from offload_triforce.speculation.sampling import residual, verify
from offload_triforce.speculation.text import TokenText
from offload_triforce.stats import DecodeStats

VOCABULARY = 3
EOS = 2
PROMPT = torch.tensor([0, 1])
TARGET, MIDDLE, DRAFT = range(3)


class Tables:
    """Fixed random distributions: one per (level, epoch, new tokens). ``cut`` has zeros, as after top-p."""

    def __init__(self, seed, style):
        self.seed, self.style, self.rows = seed, style, {}

    def row(self, level, epoch, tokens):
        key = (level, epoch, *tokens)
        if key not in self.rows:
            random = np.random.default_rng([self.seed, *key, len(tokens)])
            row = random.dirichlet(np.full(VOCABULARY, 0.8))
            if self.style == "cut":
                row[random.integers(VOCABULARY)] = 0
            if self.style == "greedy":
                row = np.eye(VOCABULARY)[row.argmax()]
            self.rows[key] = torch.from_numpy(row / row.sum())
        return self.rows[key]


class Toy:
    """What a toy has read of the text; as a real cache would, it goes wrong if it is not told what to forget."""

    scored_last = None

    def __init__(self, tables, level):
        self.tables, self.level, self.read = tables, level, []

    def row(self, text, n):
        """After the first n tokens. Levels 0 and 1 change their mind after each pass, as a refreshed cache does."""
        epoch = 0 if self.level == TARGET else text.decided
        return self.tables.row(self.level, epoch, text[len(PROMPT) : n])

    def take_in(self, text, rows):
        assert text[: len(self.read)] == self.read, "it holds tokens that are no longer in the text"
        assert len(text) - len(self.read) >= rows, "it is asked about tokens that it has read before"
        self.read = text[:]

    def keep(self, length):
        self.read = self.read[:length]


class ToyLevel(Toy):
    def score(self, text, guesses):
        Toy.scored_last = self.level
        self.take_in(text, guesses + 1)
        return torch.stack([self.row(text, n) for n in range(len(text) - guesses, len(text) + 1)])


class ToyTarget(ToyLevel):
    """Commits what it has been told to, and nothing else."""

    def __init__(self, tables):
        super().__init__(tables, TARGET)
        self.committed = []

    def score(self, text, guesses):
        assert self.read == self.committed == text[: text.decided - 1][: len(self.read)]
        return super().score(text, guesses)

    def settle(self):
        self.committed = self.read


class ToyDraft(Toy):
    """Guesses nothing ("none"); draws from its rows, as a model does ("sampled"); or is certain of itself and
    sometimes makes fewer guesses than it may, as look-up in the text does ("onehot").
    """

    def __init__(self, tables, kind, choices):
        super().__init__(tables, DRAFT)
        self.kind, self.choices = kind, choices

    def propose(self, text, limit):
        rows = [torch.empty(0, VOCABULARY)]
        for i in range(limit):
            self.take_in(text, 1)
            row = self.row(text, len(text))
            if self.kind == "none" or (self.kind == "onehot" and i and row[0] > 0.5):
                break
            if self.kind == "onehot":
                row = torch.nn.functional.one_hot(row.argmax(), VOCABULARY)
            text.append([self.choices.draw(row)])
            rows.append(row[None])
        return torch.cat(rows)


class Case:
    """One run of ``decode``: its result, and how often each level is expected to reject."""

    def __init__(self, draft, gamma, gamma1, tokens=2, ahead=2, style="full", seed=0):
        """``tokens``: compared. ``ahead``: how many more could have come, so that passes have full length."""
        self.draft, self.gamma, self.gamma1 = draft, gamma, gamma1
        self.tokens, self.ahead, self.tables = tokens, ahead, Tables(seed, style)

    def run(self, choices):
        target, level = ToyTarget(self.tables), ToyLevel(self.tables, MIDDLE)
        draft, stats = ToyDraft(self.tables, self.draft, choices), DecodeStats()
        middle = Middle(level, draft, self.gamma1, choices, stats.draft, lambda text: text[-1:] == [EOS])
        limit = self.tokens + self.ahead
        text = TokenText(PROMPT, len(PROMPT) + limit + 1)
        out = []
        for new in decode(target, middle, text, self.gamma, limit, choices, stats, self.stop):
            assert new
            out += new
        assert text[:] == PROMPT.tolist() + out
        assert stats.new_tokens == len(out)
        return tuple(out), stats

    def stop(self, text, start):
        """After the first EOS, or where enough has come to compare."""
        for length in range(start + 1, len(text) + 1):
            if text[length - 1 : length] == [EOS] or length == len(PROMPT) + self.tokens:
                return length
        return None

    def measured(self):
        """Distribution of the output, and the expected rejections of levels 1 and 2."""
        total, rejections = {}, np.zeros(2)
        for probability, (out, stats) in walks(self.run):
            total[out] = total.get(out, 0.0) + probability
            counts = (stats.draft, stats.retrieval)
            rejections += [probability * (count.judged - count.accepted) for count in counts]
        return total, rejections

    def expected(self):
        """The target alone, token by token."""
        total = {}
        for out in itertools.product(range(VOCABULARY), repeat=self.tokens):
            out = out[: out.index(EOS) + 1] if EOS in out else out
            rows = [self.tables.row(TARGET, 0, out[:i]) for i in range(len(out))]
            total[out] = float(np.prod([row[token] for row, token in zip(rows, out, strict=True)]))
        return total

    def error(self):
        """Largest difference of a probability, and the expected rejections."""
        (got, rejections), expected = self.measured(), self.expected()
        assert set(got) <= set(expected)
        return max(abs(got.get(out, 0.0) - chance) for out, chance in expected.items()), rejections


DRAFTS = [("none", 0), ("none", 2), ("onehot", 1), ("onehot", 2), ("sampled", 1), ("sampled", 2)]
GAMMAS = [(gamma, *draft) for gamma in (1, 2, 3) for draft in DRAFTS]


@pytest.mark.parametrize(("gamma", "draft", "gamma1"), GAMMAS)
def test_output_is_the_targets(gamma, draft, gamma1):
    """Passes at full length: the text could have gone on, so no pass is cut short by the limit."""
    error, (level1, level2) = Case(draft, gamma, gamma1, tokens=3 if gamma < 3 else 2).error()
    assert error < 1e-12
    assert level2 > 0.3
    if draft != "none" and gamma > 1:  # with gamma 1, level 1 draws its only guess itself
        assert level1 > 0.3


@pytest.mark.parametrize("draft", ["none", "onehot", "sampled"])
def test_output_is_the_targets_up_to_the_limit(draft):
    """The limit of new tokens shortens the last passes; whole texts of up to four tokens are compared."""
    error, (_, level2) = Case(draft, 3, 2, tokens=4, ahead=0, seed=1).error()
    assert error < 1e-12
    assert level2 > 0.3


@pytest.mark.parametrize("seed", [0, 1, 3])
@pytest.mark.parametrize("draft", ["onehot", "sampled"])
def test_output_is_the_targets_with_zeros(draft, seed):
    """As after top-p, each level rules out tokens that another may want."""
    assert Case(draft, 3, 2, tokens=3, style="cut", seed=seed).error()[0] < 1e-12


@pytest.mark.parametrize("draft", ["none", "onehot", "sampled"])
def test_greedy_output_is_the_targets(draft):
    """One-hot distributions leave nothing to chance: one walk, the target's own text."""
    rejections = np.zeros(2)
    for seed in range(20):
        error, rejected = Case(draft, 3, 2, tokens=5, style="greedy", seed=seed).error()
        assert error == 0
        rejections += rejected
    assert rejections[1] > 5
    assert draft == "none" or rejections[0] > 5


def broken(odds="p/q", rest="p-q", bonus=0, only=None):
    """``verify`` as it should be, or with a mistake, at level ``only`` (or at both)."""

    def mutant(guesses, q, p, choices):
        if only is not None and Toy.scored_last != only:
            return verify(guesses, q, p, choices)
        for i, token in enumerate(guesses):
            ratio = p[i, token] / q[i, token] if odds == "p/q" else q[i, token] / p[i, token]
            if not choices.accept(min(1.0, float(ratio))):
                if rest == "p":
                    return i, choices.draw(p[i])
                return i, choices.draw(residual(p[i + (rest == "next p-q")], q[i]))
        return len(guesses), choices.draw(p[len(guesses) - min(bonus, len(guesses))])

    return mutant


SAMPLED = ("sampled", 2, 1)


def test_the_unbroken_mutant_is_exact(monkeypatch):
    """The mutations below differ from the rule by nothing but their mistake."""
    monkeypatch.setattr(hierarchy, "verify", broken())
    assert Case(*SAMPLED).error()[0] < 1e-12


@pytest.mark.parametrize("level", [MIDDLE, TARGET])
@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param({"rest": "p"}, id="resamples from p itself"),
        pytest.param({"odds": "q/p"}, id="accepts with min(1, q/p)"),
        pytest.param({"rest": "next p-q"}, id="residual of the next row"),
        pytest.param({"bonus": 1}, id="bonus token from the row before"),
    ],
)
def test_a_mistake_at_either_level_shows(monkeypatch, mistake, level):
    """At level 1 too: what it reports as q must be what its tokens were really drawn from."""
    monkeypatch.setattr(hierarchy, "verify", broken(**mistake, only=level))
    tokens = 3 if "bonus" in mistake else 2  # the target's bonus token is the third
    assert Case(*SAMPLED, tokens).error()[0] > 1e-3


def test_reporting_the_drafts_distributions_shows(monkeypatch):
    """A token that the draft guessed and level 1 accepted has level 1's distribution, not the draft's."""

    def mutant(level, below, text, guesses, choices, count):
        start = len(text)
        p = hierarchy_judge(level, below, text, guesses, choices, count)
        if level.level == TARGET:
            return p
        return torch.stack([below.row(text, n) for n in range(start, len(text))])

    hierarchy_judge = hierarchy.judge
    monkeypatch.setattr(hierarchy, "judge", mutant)
    assert Case(*SAMPLED).error()[0] > 1e-3


def test_the_error_of_the_released_triforce():
    """With p = (.5, .5) and q = (.9, .1), resampling a rejected token from p itself emits (.7, .3)."""
    p, q = (
        torch.tensor([[0.5, 0.5]] * 2, dtype=torch.float64),
        torch.tensor([[0.9, 0.1]], dtype=torch.float64),
    )

    def first_token(rule):
        def program(choices):
            guess = choices.draw(q[0])
            accepted, token = rule([guess], q, p, choices)
            return guess if accepted else token

        return distribution_of(program)

    assert first_token(verify) == pytest.approx({0: 0.5, 1: 0.5}, abs=1e-7)
    assert first_token(broken(rest="p")) == pytest.approx({0: 0.7, 1: 0.3}, abs=1e-7)
