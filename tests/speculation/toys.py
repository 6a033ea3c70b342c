"""The levels of the hierarchy as toys with fixed random distributions; what ties them is the code under test."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from offload_triforce.scheduler.clock import HostClock
from offload_triforce.scheduler.pipeline import Slack
from offload_triforce.speculation.acceptance import DraftToken
from offload_triforce.speculation.adaptive import AcceptanceModel, DraftController, make_costs
from offload_triforce.speculation.direct import DirectDrafter, RestingDrafter
from offload_triforce.speculation.draft_selector import DraftSelector
from offload_triforce.speculation.hierarchy import decode
from offload_triforce.speculation.place import PathState, Place
from offload_triforce.speculation.processors import stateless
from offload_triforce.speculation.sampling import Sampler, Survey
from offload_triforce.speculation.stats import DecodeStats
from offload_triforce.speculation.text import TokenText
from offload_triforce.speculation.tree import tokens_of
from offload_triforce.speculation.tree_drafter import Limits, TreeDrafter
from tests.stateful import Moody

VOCABULARY = 3
EOS = 2
PROMPT = torch.tensor([0, 1])
TARGET, MIDDLE, DRAFT = range(3)


def path_after(text, node):
    """The text up to a node, [n + depth]: the root is the text's own last token."""
    return text[:] + tokens_of(node.path()[1:])


class Tables:
    """Fixed random distributions: one per (level, epoch, new tokens). ``cut`` has zeros, as after top-p."""

    def __init__(self, seed, style="full", vocabulary=VOCABULARY, likeness=0.0):
        """``likeness``: how much the lower levels are like the target, 0 to 1."""
        self.seed, self.style, self.rows = seed, style, {}
        self.vocabulary, self.likeness = vocabulary, likeness

    def row(self, level, epoch, tokens):
        key = (level, epoch, *tokens)
        if key not in self.rows:
            random = np.random.default_rng([self.seed, *key, len(tokens)])
            row = random.dirichlet(np.full(self.vocabulary, 0.8))
            if self.style == "cut":
                row[random.integers(self.vocabulary)] = 0
            row = torch.from_numpy(row / row.sum())
            if level != TARGET and self.likeness:
                row = (1 - self.likeness) * row + self.likeness * self.row(TARGET, 0, tokens)
            self.rows[key] = row
        return self.rows[key]


class Scores:
    """Stands in for the sampler: logits are logarithms already, and stay float64, so that sums are exact."""

    do_sample, vocabulary = True, VOCABULARY

    def tell_drafts(self, logits, places, tell):
        assert len(logits) == len(places)
        return tell(logits, range(len(logits))).tolist()

    def survey(self, logits, tell):
        return Survey(True, tell(logits, range(len(logits))).tolist())

    def target_scores(self, logits, place):
        assert len(logits) == 1
        return logits

    def check(self, best, logits, place):
        assert best > float("-inf")


class Turns(LogitsProcessor):
    """Favours one token and rules another out, by the number of its calls. Notes which places it was asked about."""

    def __init__(self):
        self.calls, self.seen = 0, []

    def __call__(self, input_ids, scores):
        self.calls += 1
        self.seen.append(input_ids[0].tolist())
        scores[:, self.calls % 3] += 1.5
        scores[:, (self.calls + 1) % 3] = -torch.inf if self.calls % 2 else 0.5
        return scores


class ForkingTurns(Turns):
    def fork(self):
        return copy.deepcopy(self)


@stateless
class Pedant(LogitsProcessor):
    """No token twice in a row: it rules that out, and a path where it has happened is an error."""

    def __call__(self, input_ids, scores):
        if len(input_ids[0]) > len(PROMPT) and input_ids[0, -1] == input_ids[0, -2]:
            raise ValueError("a token has come twice")
        scores[:, input_ids[0, -1]] = -torch.inf
        return scores


# What users may bring along, by how it is treated.
BROUGHT = {"unknown": Turns, "forks": ForkingTurns, "forks by scores": Moody, "rejects": Pedant}


def real_sampler(brought):
    """Transformers' own interface, with a new processor; in float32, as there."""
    return Sampler(LogitsProcessorList([BROUGHT[brought]()]), True, VOCABULARY)


def scored_alone(case, brought, out):
    """The target's scores [V] at each place of a text, by a new processor that is called once per token."""
    processor = BROUGHT[brought]()
    for length in range(len(out)):
        ids = torch.tensor([PROMPT.tolist() + list(out[:length])])
        yield processor(ids, case.tables.row(TARGET, 0, out[:length]).log().float()[None])[0]


class ToyLevel:
    """Level 1. As a real cache would, it goes wrong if it is not told what to forget."""

    def __init__(self, tables, text):
        self.tables, self.text, self.read = tables, text, []

    def row(self, node):
        """Changes its mind after each pass, as a refreshed cache does."""
        return self.tables.row(MIDDLE, self.text.decided, path_after(self.text, node)[len(PROMPT) :])

    def score(self, nodes, before):
        assert list(before) == self.read
        for node in nodes:
            assert node not in self.read, "it is asked about a token that it has read before"
            assert node.parent is None or node.parent in self.read, "it has not read what comes before"
            self.read.append(node)
        return torch.stack([self.row(node).log() for node in nodes])

    def keep(self, kept):
        assert list(kept) == sorted(set(kept))
        self.read = [self.read[number] for number in kept]


class ToyTarget:
    """Commits what it has been told to, and nothing else. During its pass there is time for ``spare`` calls of idle."""

    def __init__(self, tables, text, spare=0):
        self.tables, self.text, self.spare = tables, text, spare
        self.committed = text[:-1]
        self.nodes = []

    def score(self, nodes, idle):
        assert not self.nodes
        assert self.committed == self.text[:-1], "what it has committed is the text but for its last token"
        assert nodes[0].parent is None
        assert nodes[0].token == self.text[-1:][0]
        assert all(node.parent in nodes[:number] for number, node in enumerate(nodes) if number)
        self.nodes = list(nodes)
        rows = [self.tables.row(TARGET, 0, path_after(self.text, node)[len(PROMPT) :]).log() for node in nodes]
        for _ in range(self.spare):
            idle()
        return torch.stack(rows)

    def slack(self):
        return Slack(0.0, 0.0)

    def commit(self, kept):
        path = [self.nodes[number] for number in kept]
        assert path[0] is self.nodes[0]
        assert all(node.parent is parent for parent, node in itertools.pairwise(path))
        self.committed += [node.token for node in path]
        self.nodes = []


class ToyDrafter:
    """Draws from its rows, as a model does ("sampled"); or is certain of itself and sometimes drafts fewer tokens than
    it may, as look-up in the text does ("onehot").
    """

    def __init__(self, tables, kind, rule):
        self.tables, self.kind, self.rule = tables, kind, rule

    def offer(self, text):
        return "model"

    def draft(self, text, count, before):
        start, drafted, state = len(text), [], PathState(before)
        for i in range(count):
            row = self.tables.row(DRAFT, text.decided, text[len(PROMPT) :])
            if self.kind == "onehot":
                if i and row[0] > 0.5:
                    break
                draft_token = DraftToken(int(row.argmax()), None)
            else:
                draft_token = self.rule.draft(row.log()[None], Place(text.ids_on, len(text), state))
                if draft_token is None:
                    break
                state = PathState(state)
            drafted.append(draft_token)
            text.append([draft_token.token])
        text.truncate(start)
        return drafted


# As many ranks and kinds as the rules have; good enough for topk to be made.
FLAT = ((0.6,) * 16, (0.3,) * 16, (0.1,) * 16)


class Settled:
    """Trials whose outcome is settled: level 1 rests in the rounds that ``resting`` says, and then begins again."""

    def __init__(self, resting):
        self._rounds, self.resting = itertools.cycle(resting), True

    def begin(self):
        self.resting = next(self._rounds)

    def too_dear(self, step):
        return False

    def round(self, new_tokens, cost):
        pass


class Case:
    """Runs of ``decode`` over toys.

    Args:
        draft: "none", "onehot" or "sampled". gamma1: its tokens at a time.
        gamma, nodes, topk, width: see ``Limits``. spare: calls of idle per pass.
        tokens: compared. more: how many more could have come, so that passes have full length.
        adaptive: what a step costs, in passes; None grows all trees to their limits.
        endless: whether no token ends a text.
        resting: in which rounds level 1 rests, so that the drafter drafts for the target itself.
    """

    def __init__(
        self,
        draft="none",
        gamma=2,
        gamma1=0,
        nodes=None,
        topk=1,
        width=1,
        spare=0,
        tokens=2,
        more=2,
        style="full",
        seed=0,
        adaptive=None,
        likeness=0.0,
        endless=False,
        resting=None,
    ):
        self.end = None if endless else EOS
        self.draft, self.gamma1, self.spare, self.adaptive, self.resting = draft, gamma1, spare, adaptive, resting
        self.tokens, self.more, self.tables = tokens, more, Tables(seed, style, likeness=likeness)
        nodes = nodes or gamma
        room = 2 * nodes + 1 + width + gamma1
        self.limits = Limits(gamma, nodes, topk, width, room, adaptive is not None, spare > 0)

    def run(self, rule, out=None):
        """One run: the new tokens, and what was counted. ``out``: a list for what comes, if it may fail on the way."""
        limit = self.tokens + self.more
        text, stats = TokenText(PROMPT, len(PROMPT) + limit + 1), DecodeStats()
        drafts = [] if self.draft == "none" else [ToyDrafter(self.tables, self.draft, rule)]
        target, level = ToyTarget(self.tables, text, self.spare), ToyLevel(self.tables, text)
        controller = DraftController(make_costs(self.adaptive), Settled(self.resting) if self.resting else None)
        if self.spare:
            controller.has_time = lambda tokens: not controller.busy
            controller.busy = True
            score = target.score

            def during(nodes, idle):
                controller.busy = False
                rows = score(nodes, idle)
                controller.busy = True
                return rows

            target.score = during
        selector = DraftSelector(drafts, self.gamma1, adaptive=False)
        tree_drafter = TreeDrafter(
            level,
            selector,
            rule,
            self.limits,
            AcceptanceModel(FLAT),
            controller,
            lambda token: token == self.end,
            stats,
            HostClock(),
        )
        if self.resting:
            direct = DirectDrafter(DraftSelector(drafts, self.gamma1, adaptive=False), stats)
            tree_drafter = RestingDrafter(tree_drafter, direct)
        out = [] if out is None else out
        for new in decode(target, tree_drafter, rule, text, limit, stats, self.stop):
            assert new
            out += new
        assert text[:] == PROMPT.tolist() + out
        assert stats.new_tokens == len(out)
        return tuple(out), stats

    def stop(self, text):
        """After the first EOS, or where enough has come to compare."""
        return text[-1:] == [self.end] or len(text) == len(PROMPT) + self.tokens

    def expected(self, brought=None):
        """The target alone, token by token: probability of each output. ``brought``: a logits processor."""
        total = {}
        for out in itertools.product(range(VOCABULARY), repeat=self.tokens):
            out = out[: out.index(EOS) + 1] if EOS in out else out
            total[out] = 1.0
            scores = scored_alone(self, brought, out) if brought is not None else None
            for length, token in enumerate(out):
                row = self.tables.row(TARGET, 0, out[:length]) if scores is None else next(scores).double().softmax(0)
                total[out] *= float(row[token])
                if not total[out]:  # a processor need not know what follows
                    break
        return total
