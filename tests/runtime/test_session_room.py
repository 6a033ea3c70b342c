"""Texts that memory has no room for: the least recently used leave, for a folder where there is one."""

from __future__ import annotations

import pytest

from offload_triforce import TriForce
from offload_triforce.runtime import pool
from offload_triforce.runtime.held import KVShape
from tests.runtime.desk import HOW, KEEPS, Desk, draw_ids, model_of
from tests.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("small_groups")


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
