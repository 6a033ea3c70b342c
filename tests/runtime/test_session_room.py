"""Texts that memory has no room for: the least recently used leave, for a folder where there is one."""

from __future__ import annotations

import pytest

from offload_triforce import TriForce
from offload_triforce.runtime import pool
from offload_triforce.runtime.held import KVShape
from offload_triforce.runtime.session_check import verify_text
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
        assert len(list(tmp_path.iterdir())) == 2, "what is in the caches lies there too, as it was"
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


def shards(folder):
    return {path.name: path.stat().st_ino for path in folder.glob("kv-*")}


def test_a_text_in_use_stays_on_disk_and_only_what_is_new_is_written(tmp_path):
    """So whoever comes after a ``kill -9`` finds what there was when it was taken into use."""
    how, document = {**HOW, "session_dir": str(tmp_path)}, list(draw_ids(1, 100))
    with TriForce(model_of("llama"), **how) as engine:
        first = engine.generate(document, max_new_tokens=4, do_sample=False).token_ids
    (folder,) = tmp_path.iterdir()
    before = shards(folder)
    longer = [*document, *first, *draw_ids(2, 70)]
    with TriForce(model_of("llama"), **how) as engine:
        second = engine.generate(longer, max_new_tokens=4, do_sample=False)
        assert second.stats.reused_tokens == 103
        verify_text(folder)
        assert shards(folder) == before
        with TriForce(model_of("llama"), **how) as after_a_kill:
            kept = after_a_kill._texts.pool._texts
            assert [len(text.parked.tokens) for text in kept] == [103]
            kept.clear()  # it writes nothing
        engine.generate(list(draw_ids(3, 90)), max_new_tokens=4)  # another one is in use now
        engine.generate([*longer, *second.token_ids, 5], max_new_tokens=4)
    assert folder in set(tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 2
    assert verify_text(folder).length >= 170
    after = shards(folder)
    whole = [name for name, inode in before.items() if after.get(name) == inode]
    assert len(whole) == 3 * len(engine.layout.full), "blocks of 32 tokens"


def test_a_text_whose_new_state_has_no_room_is_what_it_was_on_disk(tmp_path, monkeypatch):
    how, document = {**HOW, "session_dir": str(tmp_path), "session_memory": 0}, list(draw_ids(1, 100))
    with TriForce(model_of("llama"), **how) as engine:
        engine.generate(document, max_new_tokens=4)
    with TriForce(model_of("llama"), **how) as engine:
        engine.generate([*document, *draw_ids(2, 70)], max_new_tokens=4)
        with monkeypatch.context() as patched:
            patched.setattr("offload_triforce.runtime.shard_writer.os.fsync", _full)
            with pytest.warns(RuntimeWarning, match="was not kept"):
                engine.generate(list(draw_ids(3, 90)), max_new_tokens=4)
        assert engine.generate([*document, *draw_ids(4, 20)], max_new_tokens=4).stats.reused_tokens >= 83


def _full(*_):
    raise OSError(28, "No space left on device")


def test_what_nobody_wants_any_more_leaves_the_disk(tmp_path):
    how = {**HOW, "session_dir": str(tmp_path), "session_memory": 0}
    with TriForce(model_of("llama"), **how) as engine:
        desk = Desk("llama", engine)
        for which in (0, 1, 0):
            desk.ask(which, KEEPS["all"], 60, 4, 0.0)
        assert len(list(tmp_path.iterdir())) == 2
        for session in desk.sessions[:2]:
            session.close()
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["llama", "qwen3.5"])
def test_what_was_read_in_part_leaves_for_disk_as_well(tmp_path, family):
    how = {**HOW, "session_dir": str(tmp_path)}
    with TriForce(model_of(family), **how) as engine:
        desk = Desk(family, engine)
        desk.interrupt(2, 6, 5)
        text = desk.texts[2]
    (folder,) = tmp_path.iterdir()
    assert verify_text(folder).part is not None
    with TriForce(model_of(family), **how) as engine:
        desk = Desk(family, engine)
        desk.texts[2] = text
        assert desk.ask(2, KEEPS["all"], 0, 4, 0.0).stats.resumed_tokens > 0
    assert verify_text(folder).part is None
