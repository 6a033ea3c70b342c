"""Draft tokens of level 0 for the target itself: a chain that is as long as passes have been seen to bear."""

from __future__ import annotations

import torch

from offload_triforce.speculation.direct import MOST, DirectDrafter
from offload_triforce.speculation.draft_selector import DraftSelector
from offload_triforce.speculation.ngram import NgramDrafter
from offload_triforce.speculation.stats import DecodeStats
from offload_triforce.speculation.text import TokenText


def drafted_by(direct, ids, limit, cost):
    text = TokenText(torch.tensor(ids), len(ids) + 1)
    root, *drafted = direct.propose(text, limit, cost)
    return [node.token for node in drafted], [root, *drafted]


def test_look_up_becomes_a_chain_that_grows_with_what_passes_are_seen_to_cost():
    stats = DecodeStats()
    direct = DirectDrafter(DraftSelector([NgramDrafter(1000)], MOST, adaptive=True), stats)
    ids = [*range(10, 60), 7, *range(10, 30)]
    lengths = []
    for _ in range(6):
        tokens, nodes = drafted_by(direct, ids, 40, lambda count: 1.0 + 0.01 * count)
        assert tokens == list(range(30, 30 + len(tokens)))
        assert nodes[0].candidates is None, "level 1 has nothing to learn from it"
        assert [node.parent for node in nodes[1:]] == nodes[:-1]
        direct.judged(len(tokens))
        lengths.append(len(tokens))
    assert lengths[:4] == [2, 4, 8, 16]
    assert max(lengths) == MOST
    assert (stats.draft.proposed, stats.draft.accepted) == (sum(lengths), sum(lengths))


def test_nothing_is_drafted_before_a_pass_has_been_seen_nor_beyond_the_limit():
    direct = DirectDrafter(DraftSelector([NgramDrafter(1000)], MOST, adaptive=True), DecodeStats())
    ids = [*range(10, 60), 7, *range(10, 30)]
    assert drafted_by(direct, ids, 40, None)[0] == []
    assert drafted_by(direct, ids, 0, lambda count: 1.0)[0] == []
    assert drafted_by(direct, ids, 1, lambda count: 1.0)[0] == [30]


def test_drafts_that_are_never_right_stop():
    direct = DirectDrafter(DraftSelector([NgramDrafter(1000)], MOST, adaptive=True), DecodeStats())
    ids, read = [5, 6, 9, 5, 6, 8, 5, 6], 0
    for _ in range(100):
        tokens, _ = drafted_by(direct, ids, 16, lambda count: 1.0 + 0.15 * count)
        direct.judged(0)
        read += len(tokens)
    assert read <= 20
