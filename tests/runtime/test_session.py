"""What was read is not read again, and whatever was asked before, an answer is that of a fresh engine."""

from __future__ import annotations

import contextlib
import gc
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.streamers import BaseStreamer

from offload_triforce import TriForce
from offload_triforce.planner import sizes
from offload_triforce.runtime import pool
from offload_triforce.runtime.held import KVShape
from offload_triforce.runtime.runtime import PREFILL_QUERIES
from tests.tiny import VOCABULARY, tiny_model

FAMILIES = ("llama", "gemma3", "qwen3.5", "qwen3-moe")
SMALL = {"budget": 64, "chunk": 4, "sink": 4, "recent": 8, "tile": 8, "gamma": 6, "draft_tokens": 16}
CONTEXT = 320
HOW = {**SMALL, "prefill_chunk": 16, "context": CONTEXT, "link_gbps": 1000.0}  # a link whose bytes are counted


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch):
    """So that short texts are read in several groups, and are worth keeping."""
    monkeypatch.setattr(sizes, "GROUP", 40)
    monkeypatch.setattr(sizes, "MARKED_GROUP", 24)
    monkeypatch.setattr(pool, "WORTH_KEEPING", 12)
    monkeypatch.setattr(pool, "LEAST_SHARED", 4)


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


KEEPS = {
    "all": lambda n: n,
    "but one": lambda n: n - 1,
    "but few": lambda n: n - 7,
    "half": lambda n: n // 2,
    "little": lambda n: 6,
}
ASK = st.tuples(
    st.integers(0, 2),
    st.sampled_from(list(KEEPS)),
    st.sampled_from([0, 1, 5, 30, 90]),
    st.sampled_from([1, 4, 15]),
    st.sampled_from([0.0, 0.9]),
)
INTERRUPT = st.tuples(st.integers(0, 2), st.sampled_from([3, 60]), st.integers(0, 30))


@settings(deadline=None, max_examples=12)
@given(
    st.sampled_from(FAMILIES),
    st.lists(st.one_of(ASK, ASK, INTERRUPT), min_size=3, max_size=9),
    st.sampled_from(["ngram", "self", "none"]),
)
def test_any_history_is_a_fresh_engine(family, happenings, draft):
    gamma = {"gamma": 0, "draft_tokens": None} if draft == "none" else {}
    with TriForce(model_of(family), draft=draft, **{**HOW, **gamma}) as engine:
        desk = Desk(family, engine)
        for happening in happenings:
            if len(happening) == 3:
                desk.interrupt(*happening)
            else:
                which, keep, *rest = happening
                desk.ask(which, KEEPS[keep], *rest)


@pytest.fixture(params=FAMILIES)
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
    assert desk.ask(0, KEEPS["all"], 5, 8, 0.0).stats.reused_tokens == held


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


def test_without_memory_for_others_they_are_read_again():
    with TriForce(model_of("llama"), session_memory=0, **HOW) as engine:
        desk = Desk("llama", engine)
        for which in (0, 1, 0):
            assert desk.ask(which, KEEPS["all"], 20, 8, 0.0).stats.reused_tokens == 0


def test_the_least_recently_used_text_leaves_first():
    with TriForce(model_of("llama"), **HOW) as engine:
        desk = Desk("llama", engine)
        desk.ask(0, KEEPS["all"], 20, 8, 0.0)
        one = engine._texts.source(desk.sessions[0].text)
        size = pool.text_bytes(one)
    with TriForce(model_of("llama"), session_memory=int(1.5 * size), **HOW) as engine:
        desk = Desk("llama", engine)
        desk.sessions[2] = engine.session()
        for which in (0, 1, 2):
            desk.ask(which, KEEPS["all"], 20, 8, 0.0)
        held = [len(session.tokens) for session in desk.sessions]
        assert held[0] == 0
        assert all(held[1:])


def test_reuse_can_be_turned_off():
    with TriForce(model_of("llama"), reuse=False, **HOW) as engine:
        prompt = list(draw_ids(1, 60))
        for _ in range(2):
            assert engine.generate(prompt, max_new_tokens=4).stats.reused_tokens == 0


def test_many_turns_take_no_more_memory():
    """Counted in tensors that are alive: what the C library keeps is its own affair."""

    def tensors():
        gc.collect()
        return sum(each.nbytes for each in gc.get_objects() if isinstance(each, torch.Tensor))

    with TriForce(model_of("gemma3"), **HOW) as engine:
        desk, after = Desk("gemma3", engine), []
        for turn in range(40):
            desk.ask(turn % 2, KEEPS["half"], 60, 4, 0.0)
            if turn in (19, 39):
                fresh.cache_clear()
                after.append(tensors())
        assert after[1] <= 1.1 * after[0]


def test_closing_a_session_forgets_its_text(desk):
    desk.ask(0, KEEPS["all"], 20, 4, 0.0)
    assert len(desk.sessions[0].tokens) > 0
    desk.sessions[0].close()
    assert len(desk.sessions[0].tokens) == 0
    assert desk.ask(0, KEEPS["all"], 20, 4, 0.0).stats.reused_tokens == 0


def test_what_memory_has_no_room_for_goes_to_disk_and_comes_back(tmp_path):
    """The least recently used first; all of them when the engine closes, and the next engine finds them."""
    how = {**HOW, "session_memory": 0, "session_dir": str(tmp_path)}
    with TriForce(model_of("qwen3.5"), **how) as engine:
        desk = Desk("qwen3.5", engine)
        desk.sessions = [None, None, None]
        for which in (0, 1, 0, 1):
            reused = desk.ask(which, KEEPS["all"], 20, 8, 0.0).stats.reused_tokens
            assert bool(reused) == (desk.count > 2)
        texts = desk.texts
        assert len(list(tmp_path.iterdir())) == 1, "one is in the caches"
    assert len(list(tmp_path.iterdir())) == 2
    with TriForce(model_of("qwen3.5"), **how) as engine:
        desk = Desk("qwen3.5", engine)
        desk.sessions, desk.texts, desk.count = [None, None, None], texts, 10
        for which in (0, 1):
            held = len(texts[which]) - 1
            assert desk.ask(which, KEEPS["all"], 20, 8, 0.0).stats.reused_tokens == held
    with TriForce(tiny_model("qwen3.5", seed=2), **how) as other:
        assert not other.generate(list(texts[0]), max_new_tokens=2).stats.reused_tokens


def test_a_damaged_text_on_disk_is_read_again(tmp_path):
    how = {**HOW, "session_dir": str(tmp_path)}
    with TriForce(model_of("llama"), **how) as engine:
        engine.generate(list(draw_ids(1, 60)), max_new_tokens=4)
    (folder,) = tmp_path.iterdir()
    (folder / "session.json").write_text("{}")
    with pytest.warns(RuntimeWarning, match="damaged"), TriForce(model_of("llama"), **how) as engine:
        assert not engine.generate(list(draw_ids(1, 60)), max_new_tokens=4).stats.reused_tokens


@pytest.mark.parametrize("family", ["gemma3", "qwen3.5"])
def test_sessions_are_kept_where_nothing_else_is(family):
    """With ``reuse=False``, windows and states of a user's sessions are kept all the same, and nobody else's text."""
    with TriForce(model_of(family), reuse=False, **HOW) as engine:
        desk = Desk(family, engine)
        for which in (0, 1, 0, 2, 0, 1):
            held = 0 if desk.sessions[which] is None else len(desk.sessions[which].tokens)
            assert desk.ask(which, KEEPS["all"], 20, 8, 0.0).stats.reused_tokens == held
        assert desk.sessions[0].tokens.tolist() == list(desk.texts[0])[:-1]


def test_a_text_that_is_about_to_be_used_makes_no_way():
    """With room for one, it is the other that leaves."""
    with TriForce(model_of("llama"), **HOW) as engine:
        size = KVShape.of(engine.layout).token_bytes
    document = draw_ids(5, 100)
    with TriForce(model_of("llama"), session_memory=150 * size, **HOW) as engine:
        desk = Desk("llama", engine)
        desk.texts = [document, draw_ids(6, 60), document]
        desk.sessions = [None, engine.session(), engine.session()]
        desk.ask(0, KEEPS["all"], 5, 4, 0.0)  # parked by the next
        desk.ask(1, KEEPS["all"], 5, 4, 0.0)
        assert desk.ask(2, KEEPS["all"], 9, 4, 0.0).stats.reused_tokens >= 90


def test_a_users_session_in_the_same_folder_is_left_alone(tmp_path):
    how = {**HOW, "session_dir": str(tmp_path), "session_memory": 0}
    with TriForce(model_of("llama"), **how) as engine:
        session = engine.session()
        session.generate(list(draw_ids(1, 60)), max_new_tokens=4)
        session.save(tmp_path / "text-book")
    with TriForce(model_of("llama"), **how) as engine:
        with engine.load_session(tmp_path / "text-book") as session:
            assert session.generate(list(draw_ids(1, 60)), max_new_tokens=4).stats.reused_tokens > 0
        engine.generate(list(draw_ids(2, 60)), max_new_tokens=4)
    assert (tmp_path / "text-book" / "session.json").exists()


def test_a_text_on_disk_that_turns_out_damaged_costs_no_answer(tmp_path):
    how = {**HOW, "session_dir": str(tmp_path)}
    with TriForce(model_of("llama"), **how) as engine:
        expected = engine.generate(list(draw_ids(1, 60)), max_new_tokens=4, do_sample=False).token_ids
    for shard in next(tmp_path.iterdir()).glob("kv-*"):
        data = bytearray(shard.read_bytes())
        data[-3] ^= 1
        shard.write_bytes(data)
    with TriForce(model_of("llama"), **how) as engine, pytest.warns(RuntimeWarning, match="read again"):
        answer = engine.generate(list(draw_ids(1, 60)), max_new_tokens=4, do_sample=False)
    assert answer.token_ids == expected
    assert answer.stats.reused_tokens == 0


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
