"""What was read is not read again: it is counted, what of it, and over the link."""

from __future__ import annotations

import pytest
from transformers.generation.streamers import BaseStreamer

from offload_triforce import TriForce
from offload_triforce.planner import sizes
from offload_triforce.runtime.runtime import PREFILL_QUERIES
from tests.runtime.desk import HOW, KEEPS, Desk, draw_ids, model_of

pytestmark = pytest.mark.usefixtures("small_groups")


class Impatient(BaseStreamer):
    """Wants no more after some tokens."""

    def __init__(self):
        self.seen = 0

    def put(self, value):
        self.seen += 1
        if self.seen > 5:
            raise KeyboardInterrupt

    def end(self):
        pass


@pytest.fixture(params=("llama", "gemma3", "qwen3.5"))
def desk(request):
    with TriForce(model_of(request.param), **HOW) as engine:
        yield Desk(request.param, engine)


def test_a_text_that_goes_on_is_not_read_again(desk):
    first = desk.ask(0, KEEPS["all"], 60, 10, 0.0)
    assert first.stats.reused_tokens == 0
    held = len(desk.texts[0]) - 1  # the newest token is not read yet
    assert desk.ask(0, KEEPS["all"], 40, 10, 0.0).stats.reused_tokens == held


def test_a_retry_reads_next_to_nothing(desk):
    desk.ask(0, KEEPS["all"], 60, 10, 0.9)
    prompt = len(desk.texts[0]) - 10
    retried = desk.ask(0, lambda n: prompt, 0, 10, 0.9)
    assert prompt - 1 - PREFILL_QUERIES <= retried.stats.reused_tokens < prompt
    plan = desk.engine.runtime.plan
    assert retried.stats.prefill_link_bytes <= plan.streamed_bytes(plan.tiles) + 2 * plan.layers * plan.tile_bytes


def test_two_sessions_in_turns_are_each_alone(desk):
    for _ in range(3):
        for which in (0, 1):
            held = len(desk.texts[which]) - 1
            answer = desk.ask(which, KEEPS["all"], 20, 8, 0.0)
            assert answer.stats.reused_tokens in (0, held)
            assert answer.stats.reused_tokens or desk.count <= 2


def test_another_client_shares_a_beginning(desk):
    """And takes nothing from whom it shares it with."""
    shared = draw_ids(7, 48)
    desk.texts[0] = shared + draw_ids(8, 30)
    desk.texts[1] = shared + draw_ids(9, 30)
    desk.ask(0, KEEPS["all"], 10, 4, 0.0)
    other = desk.ask(1, KEEPS["all"], 10, 4, 0.0)
    assert 24 <= other.stats.reused_tokens <= len(shared), "a state is cut where it was kept"
    held = len(desk.texts[0]) - 1
    assert desk.ask(0, KEEPS["all"], 10, 4, 0.0).stats.reused_tokens == held


def test_a_follow_up_brings_everything_over_the_link_once(monkeypatch):
    """However many chunks it has."""
    monkeypatch.setattr(sizes, "GROUP", 4096)
    with TriForce(model_of("llama"), **HOW) as engine:
        desk = Desk("llama", engine)
        desk.ask(0, KEEPS["all"], 120, 8, 0.0)
        runtime = engine.runtime
        plan, full = runtime.plan, runtime.caches.full
        tiles = full.tiles
        stats = desk.ask(0, KEEPS["all"], 100, 8, 0.0).stats
        written = plan.layers * plan.tile_bytes * (full._whole_tiles(stats.prompt_tokens - 1) - tiles)
        assert stats.prefill_link_bytes == plan.streamed_bytes(tiles) + written
        few = desk.ask(0, KEEPS["all"], 3, 1, 0.0).stats  # so few are read by a pass
        assert few.prefill_link_bytes <= plan.streamed_bytes(plan.tiles) + 2 * plan.layers * plan.tile_bytes


def test_an_interrupted_prefill_goes_on_where_it_stopped(desk):
    desk.texts[0] = draw_ids(1, 150)
    chunks = 150 // 16 * len(desk.engine.layout.layers)
    desk.interrupt(0, 3, chunks // 2)
    held = len(desk.sessions[0].tokens)
    assert 24 <= held < 150
    session = desk.engine._texts.session
    worth = session.part_worth(session.part)
    stats = desk.ask(0, KEEPS["all"], 5, 8, 0.0).stats
    assert (stats.reused_tokens, stats.resumed_tokens) == (held, worth)


class Counted:
    """Progress of a prefill."""

    def __init__(self):
        self.seen = []

    def __call__(self, done, total):
        self.seen.append((done, total))


def test_a_first_prompt_that_is_interrupted_early_loses_nothing(desk):
    """Nor does it when another text is asked about in between: what was read of it is parked in part."""
    for between in (False, True):
        desk.texts[0] = draw_ids(2 + between, 36)
        desk.sessions[0].close()
        desk.sessions[0] = desk.engine.session()
        desk.interrupt(0, 0, 3)
        assert len(desk.sessions[0].tokens) == 0
        kept = desk.engine.parked_bytes
        assert kept > 36 * 4 * 40
        if between:
            desk.ask(1, KEEPS["all"], 30, 4, 0.0)
            assert desk.engine.parked_bytes == kept
        counted = Counted()
        stats = desk.ask(0, KEEPS["all"], 0, 8, 0.0, progress=counted).stats
        assert stats.reused_tokens == 0
        assert stats.resumed_tokens > 0
        assert counted.seen[0][0] == 5
        assert counted.seen[-1][0] == counted.seen[-1][1] == len(counted.seen) + 4
        if not between:
            assert desk.engine.parked_bytes == 0


def test_a_text_of_nobody_goes_on_too(desk):
    desk.texts[2] = draw_ids(5, 36)
    desk.interrupt(2, 0, 3)
    desk.ask(0, KEEPS["all"], 30, 4, 0.0)
    assert desk.ask(2, KEEPS["all"], 8, 4, 0.0).stats.resumed_tokens > 0


def test_where_a_prompt_parts_from_what_was_read_in_part_whole_chunks_stay(desk):
    """Where keys and values are all that is kept; windows and states are of the whole group."""
    desk.texts[0] = draw_ids(6, 36)
    desk.interrupt(0, 0, 3)
    stats = desk.ask(0, KEEPS["half"], 20, 8, 0.0).stats
    assert stats.reused_tokens == 0
    assert bool(stats.resumed_tokens) == (desk.family == "llama")
    assert desk.engine.parked_bytes == 0


def test_parts_keep_to_the_limit_of_session_memory():
    with TriForce(model_of("llama"), session_memory=1000, **HOW) as engine:
        desk = Desk("llama", engine)
        desk.interrupt(0, 6, 3)
        assert engine.parked_bytes == 0
        assert desk.ask(0, KEEPS["all"], 0, 8, 0.0).stats.resumed_tokens == 0


def test_an_interrupted_answer_goes_on(desk):
    prompt = list(draw_ids(3, 50))
    with pytest.raises(KeyboardInterrupt):
        desk.sessions[0].generate(prompt, max_new_tokens=30, seed=1, streamer=Impatient())
    held = desk.sessions[0].tokens.tolist()
    assert held[:49] == prompt[:49]
    assert len(held) > 50
    desk.texts[0] = tuple(held)
    assert desk.ask(0, KEEPS["all"], 5, 8, 0.0).stats.reused_tokens == len(held)


def test_a_longer_text_than_the_caches_hold_keeps_what_was_read():
    how = {name: value for name, value in HOW.items() if name != "context"}
    with TriForce(model_of("qwen3.5"), **how) as engine:
        desk = Desk("qwen3.5", engine)
        desk.ask(0, KEEPS["all"], 20, 8, 0.0)
        room = engine.runtime.context
        held = len(desk.texts[0]) - 1
        assert desk.ask(0, KEEPS["all"], 60, 8, 0.0).stats.reused_tokens == held
        assert engine.runtime.context > room


def test_reuse_can_be_turned_off():
    with TriForce(model_of("llama"), reuse=False, **HOW) as engine:
        prompt = list(draw_ids(1, 60))
        for _ in range(2):
            assert engine.generate(prompt, max_new_tokens=4).stats.reused_tokens == 0


def test_closing_a_session_forgets_its_text(desk):
    desk.ask(0, KEEPS["all"], 20, 4, 0.0)
    assert len(desk.sessions[0].tokens) > 0
    desk.sessions[0].close()
    assert len(desk.sessions[0].tokens) == 0
    assert desk.ask(0, KEEPS["all"], 20, 4, 0.0).stats.reused_tokens == 0


@pytest.mark.parametrize("family", ["gemma3", "qwen3.5"])
def test_sessions_are_kept_where_nothing_else_is(family):
    """With ``reuse=False``, windows and states of a user's sessions are kept all the same, and nobody else's text."""
    with TriForce(model_of(family), reuse=False, **HOW) as engine:
        desk = Desk(family, engine)
        for which in (0, 1, 0, 2, 0, 1):
            held = 0 if desk.sessions[which] is None else len(desk.sessions[which].tokens)
            assert desk.ask(which, KEEPS["all"], 20, 8, 0.0).stats.reused_tokens == held
        assert desk.sessions[0].tokens.tolist() == list(desk.texts[0])[:-1]


def test_what_is_interrupted_in_the_middle_of_a_change_is_not_kept(monkeypatch):
    """Neither parked nor gone on with: the caches are in no state that anybody knows."""
    with TriForce(model_of("qwen3.5"), **HOW) as engine:
        desk = Desk("qwen3.5", engine)
        desk.ask(0, KEEPS["all"], 20, 8, 0.0)
        caches = engine.runtime.caches
        with monkeypatch.context() as patch:
            patch.setattr(caches, "_sync", _interrupted)
            with pytest.raises(KeyboardInterrupt):
                desk.sessions[0].generate(list(desk.texts[0]), max_new_tokens=4)
        assert not caches.whole
        assert len(desk.sessions[0].tokens) == 0
        desk.ask(1, KEEPS["all"], 20, 8, 0.0)
        assert desk.ask(0, KEEPS["all"], 3, 8, 0.0).stats.reused_tokens == 0


def _interrupted(*_):
    raise KeyboardInterrupt
