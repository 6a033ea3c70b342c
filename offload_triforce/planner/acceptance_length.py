"""The mean acceptance length of a tree: how far the target follows it, by how often it takes level 1's k-th choice.

Pure arithmetic and seeded chance: no model is run. ``Growth`` grows the tree that ``speculation.tree_drafter`` grows:
the likeliest unread draft tokens are read next, up to ``topk`` candidates follow each token that was read, and what the
target reads are the likeliest of all. What is taken as given:

- places are told apart by level 1's lead of its first choice over its second, in the classes of ``AcceptanceByRank``;
- how sure level 1 is at a place says nothing about the next place;
- the drafter knows how often each class's candidates are taken, as its counts tell it after a while.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import random
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from offload_triforce.speculation.growth import LEAST_PROBABILITY

# Places by the lead of level 1's first choice, in steps of a quarter nat, the last class all beyond: how many there
# were, where the target took the first choice, and where the second. SmolLM2 over 6,000 tokens of source with 408 in
# the retrieval cache, T = 0.6 and 1, coupled (``taken`` in benchmarks/results/retrieval_cpu.json).
PLACES = (220, 192, 163, 159, 145, 124, 131, 97, 78, 76, 60, 51, 59, 47, 42, 404)
FIRST = (127, 141, 124, 141, 131, 115, 125, 92, 76, 74, 60, 50, 59, 47, 41, 404)
SECOND = (67, 31, 28, 10, 6, 6, 5, 4, 2, 1, 0, 1, 0, 0, 0, 0)
# And of all that these two miss: the third, the fourth, none of the four.
LATER = (43, 18, 19)
# Misses that each class is taken to have had beside: none is without, however few were seen.
UNSEEN = 0.5
# Drawn candidates, one after the other: shares of the four (``RESAMPLING_PRIOR`` in ``speculation.acceptance``).
DRAWN = (0.9, 0.04, 0.02, 0.01)
MOST_ODDS = 1e12  # of a miss, against those that were measured
SEED = 20240419
TREES = 64  # that a mean is taken over
# Classes are drawn like cards of a deck of so many, shuffled anew when it is through: each comes up about as often as
# it should, however few are drawn.
DECK = 256


@dataclass(frozen=True)
class AcceptanceByRank:
    """How often the target takes level 1's first choice, its second and so on, by class of place.

    Attributes:
        weights: share of each class in all places; they add up to one.
        shares: of each class, how often each rank is taken; what is missing to one is none of them.
    """

    weights: tuple[float, ...]
    shares: tuple[tuple[float, ...], ...]

    @property
    def ranks(self) -> tuple[float, ...]:
        """How often each rank is taken, over all places."""
        return tuple(
            sum(w * share for w, share in zip(self.weights, rank, strict=True))
            for rank in zip(*self.shares, strict=True)
        )

    @functools.cached_property
    def deck(self) -> tuple[tuple[float, ...], ...]:
        """The classes' shares, each as often as its weight says."""
        bounds = list(itertools.accumulate(self.weights))
        middles = ((card + 0.5) / DECK * bounds[-1] for card in range(DECK))
        return tuple(self.shares[min(bisect_left(bounds, x), len(bounds) - 1)] for x in middles)

    def scaled(self, first: float) -> AcceptanceByRank:
        """The same with the first choice taken that often: the odds of a miss are so many times as high in all classes.

        Of the misses, later ranks keep their shares where the first is taken more often. Where it is taken less often,
        so are they: with 0.81 instead of 0.89 for the first, the next three make up for 0.84 instead of 0.91 of what it
        misses (``among_first`` in benchmarks/results/retrieval_cpu.json), about in proportion.
        """
        low, high = 0.0, 1.0
        while self._missed(high) < 1 - first and high < MOST_ODDS:
            low, high = high, 4 * high
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self._missed(middle) < 1 - first else (low, middle)
        later = min(1.0, first / self.ranks[0])
        return replace(self, shares=tuple(_scaled(row, high, later) for row in self.shares))

    def _missed(self, odds: float) -> float:
        """Share of places where the first choice is not taken, where the odds are so many times as high."""
        return sum(w * _more(1 - row[0], odds) for w, row in zip(self.weights, self.shares, strict=True))

    def split(self, ranks: Sequence[float]) -> AcceptanceByRank:
        """The same with ``ranks`` taken that often over all places: the first as by ``scaled``, of what it misses each
        later rank the same share in all classes.
        """
        scaled, missed = self.scaled(ranks[0]), 1 - ranks[0]
        later = [share / missed if missed > 0 else 0.0 for share in ranks[1:]]
        return replace(
            scaled, shares=tuple((row[0], *((1 - row[0]) * share for share in later)) for row in scaled.shares)
        )


def _more(missed: float, odds: float) -> float:
    """A probability whose odds are so many times as high."""
    return odds * missed / (odds * missed + 1 - missed)


def _scaled(row: tuple[float, ...], odds: float, later: float) -> tuple[float, ...]:
    """A class that misses so much more often, ``later`` ranks being taken so many times as often then."""
    missed = _more(1 - row[0], odds)
    return (1 - missed, *(later * share * missed / (1 - row[0]) for share in row[1:]))


def of_coupled() -> AcceptanceByRank:
    """As measured, of the acceptance rule ``coupled``."""
    places = sum(PLACES)
    rows = []
    for count, first, second in zip(PLACES, FIRST, SECOND, strict=True):
        seen = count + UNSEEN
        left = (seen - first - second) / seen
        rows.append((first / seen, second / seen, *(left * share / sum(LATER) for share in LATER[:2])))
    return AcceptanceByRank(tuple(count / places for count in PLACES), tuple(rows))


def of_resampled() -> AcceptanceByRank:
    """Of the rule ``resampled``, which knows of no lead: one class."""
    return AcceptanceByRank((1.0,), (DRAWN,))


class Place:
    """A token of the tree: the root, or a draft token.

    Attributes:
        chance: that the target goes all the way to it. depth: 0 for the root.
        shares: how often each candidate after it is taken; None until level 1 has read it.
        children: the candidates that became draft tokens, by rank.
    """

    __slots__ = ("chance", "children", "depth", "shares")

    def __init__(self, chance: float, depth: int) -> None:
        self.chance, self.depth = chance, depth
        self.shares: tuple[float, ...] | None = None
        self.children: list[Place] = []


class Draws:
    """Seeded chance: the same for everybody who asks the same."""

    def __init__(self, table: AcceptanceByRank) -> None:
        self._table, self._cards = table, list[tuple[float, ...]]()
        self._random = random.Random(SEED)

    def shares(self) -> tuple[float, ...]:
        """Of the next place that is read."""
        if not self._cards:
            self._cards = list(self._table.deck)
            self._random.shuffle(self._cards)
        return self._cards.pop()

    def rank(self, shares: Sequence[float]) -> int:
        """Which candidate is taken at a place; one more than there are: none of them."""
        x = self._random.random()
        return bisect_right(list(itertools.accumulate(shares)), x)

    def accepted(self, rate: float, count: int) -> int:
        """How many of ``count`` tokens in a row are accepted, each at that rate."""
        return next((n for n in range(count) if self._random.random() >= rate), count)


class Growth:
    """A tree that grows step by step. ``most``: draft tokens that there is use for. ``held``: places that were read."""

    def __init__(self, draws: Draws, topk: int, most: int) -> None:
        self.draws, self.topk, self.most = draws, topk, most
        self.begin(Place(1.0, 0))

    def begin(self, root: Place) -> None:
        """Go on with what hangs below a place, which becomes the root: all that is known of it stays."""
        scale, base = root.chance, root.depth
        self.root, self.draft_tokens, self.held = root, [], 0
        self._unread: list[tuple[float, int, Place]] = []
        self._best: list[float] = []  # chances of the ``most`` likeliest, the least first
        self._count = itertools.count()
        for place in walk(root):
            place.chance, place.depth = min(1.0, place.chance / scale), place.depth - base
            self.held += place.shares is not None
            if place is not root:
                self._note(place)
        for place in [root, *self.draft_tokens]:  # what was too unlikely seen from the old root need not be so now
            if place.shares is not None:
                self._offer_after(place)

    def limit(self, most: int) -> None:
        """There is use for so many draft tokens now."""
        if most != self.most:
            self.most = most
            self._best = heapq.nlargest(most, (place.chance for place in self.draft_tokens))
            heapq.heapify(self._best)

    def _note(self, place: Place) -> None:
        self.draft_tokens.append(place)
        if len(self._best) < self.most:
            heapq.heappush(self._best, place.chance)
        else:
            heapq.heappushpop(self._best, place.chance)
        if place.shares is None:
            heapq.heappush(self._unread, (-place.chance, next(self._count), place))

    def leaves(self, width: int, deepest: int, least: float) -> list[Place]:
        """The likeliest unread draft tokens above ``deepest``, likelier than ``least``; they are taken off the list."""
        if self.root.shares is None:
            return [self.root][: min(width, deepest)]
        if len(self._best) == self.most:
            least = max(least, self._best[0])
        found, deep = [], []
        while self._unread and len(found) < width and -self._unread[0][0] > least:
            entry = heapq.heappop(self._unread)
            if entry[2].shares is None:
                (found if entry[2].depth < deepest else deep).append(entry)
        for entry in deep:
            heapq.heappush(self._unread, entry)
        return [entry[2] for entry in found]

    def put_back(self, leaves: Sequence[Place]) -> None:
        """They are not read after all."""
        for place in leaves:
            if place is not self.root:
                heapq.heappush(self._unread, (-place.chance, next(self._count), place))

    def read(self, place: Place) -> None:
        """Level 1 reads it: draw its class, and make draft tokens of its candidates."""
        place.shares, self.held = self.draws.shares(), self.held + 1
        self._offer_after(place)

    def _offer_after(self, place: Place) -> None:
        """Make draft tokens of those candidates that are none yet."""
        for rank in range(len(place.children), min(self.topk, len(place.shares))):
            chance = place.chance * place.shares[rank]
            if rank and chance < LEAST_PROBABILITY:
                return
            child = Place(chance, place.depth + 1)
            place.children.append(child)
            self._note(child)

    def picked(self, nodes: int, deepest: int, floor: float) -> list[Place]:
        """The draft tokens that the target reads: parents are never less likely than what follows them."""
        near = (place for place in self.draft_tokens if place.depth <= deepest and place.chance >= floor)
        return heapq.nlargest(nodes, near, key=lambda place: place.chance)


def walk(root: Place) -> Iterator[Place]:
    """A place and all below it, parents first."""
    todo = [root]
    while todo:
        place = todo.pop()
        yield place
        todo += place.children


def expected_length(picked: Sequence[Place]) -> float:
    """Tokens that a pass over these draft tokens brings on average: each is accepted with its chance, and the target's
    own token follows the last."""
    return 1.0 + sum(place.chance for place in picked)


def mean_acceptance_length(table: AcceptanceByRank, nodes: int, topk: int, gamma: int) -> float:
    """Of trees of ``nodes`` draft tokens, paths of ``gamma`` at most, that are grown as far as they are of use."""
    draws, lengths = Draws(table), []
    for _ in range(TREES if len(table.weights) > 1 else 1):
        growth = Growth(draws, topk, max(1, nodes))
        while leaves := growth.leaves(1, gamma, 0.0):
            growth.read(leaves[0])
        lengths.append(expected_length(growth.picked(nodes, gamma, 0.0)))
    return sum(lengths) / len(lengths)
