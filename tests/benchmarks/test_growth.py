"""Growth that is replayed is what the library does, and what is recorded is what level 1 offers."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from benchmarks.growth import app
from benchmarks.growth_record import CANDIDATES, REACH, STRIDE, Offers, Record, load_records, record_answer
from benchmarks.growth_replay import TAIL, ratio, replay, replay_all
from offload_triforce.bench.tasks import find_task
from offload_triforce.config import Settings
from offload_triforce.engine import TriForce
from tests.byte_tokenizer import byte_tokenizer, save_tiny_llama

ANSWER = [500 + place for place in range(160)]
GIVEN = Settings(draft_cost=0.01)


def by_hand(rank, gap=2.0):
    """A record whose answer is always the level's candidate of that rank, ``gap`` nats behind the one before."""

    def place(token, number):
        others = iter(range(1000 + 10 * number, 1010 + 10 * number))
        return [token if each == rank else next(others) for each in range(4)]

    scores = [-gap * each for each in range(4)]
    offers = {}
    for refresh in range(0, len(ANSWER), STRIDE):
        tokens = [place(token, refresh + n) for n, token in enumerate(ANSWER[refresh : refresh + 120])]
        offers[refresh] = Offers([scores] * len(tokens), tokens)
    return Record("by hand", 0.6, 1, [1, 2, 3, 4], ANSWER, False, offers)


def test_a_level_that_is_right_is_followed_as_far_as_trees_go():
    stats = replay(by_hand(0, gap=5.0), GIVEN)
    assert stats.passes == 1 + -(-(len(ANSWER) - TAIL - 13) // 49)  # 12 steps before it is known what pays
    stats = replay(by_hand(0, gap=5.0), Settings(draft_cost=0.01, gamma=8, draft_tokens=32, adaptive=False))
    assert stats.new_tokens == 9 * stats.passes


def test_a_branch_is_found_where_there_are_branches():
    chain = replay(by_hand(1), Settings(draft_cost=0.01, topk=1))
    tree = replay(by_hand(1, gap=0.1), Settings(draft_cost=0.01, topk=2))
    assert chain.tokens_per_pass == 1
    assert tree.tokens_per_pass > 2


def test_a_replay_may_begin_later_and_is_the_same_each_time():
    record = by_hand(1, gap=0.1)
    whole, late = replay(record, GIVEN), replay(record, GIVEN, start=40)
    assert whole.new_tokens > late.new_tokens + 20
    assert (
        replay(record, GIVEN).as_dict().items()
        >= {name: getattr(whole, name) for name in ("passes", "steps", "steps_ahead", "draft_tokens")}.items()
    )


def test_more_room_needs_wider_steps():
    """A step reads ``width`` draft tokens: with few steps, room for many draft tokens stays empty."""
    record = by_hand(1, gap=0.1)
    narrow, wide = (
        replay_all([record], Settings(draft_cost=0.05, width=width, draft_tokens=1024)) for width in (4, 32)
    )
    assert wide.per_pass("draft_tokens") > 2 * narrow.per_pass("draft_tokens")
    assert wide.tokens_per_pass[0] > narrow.tokens_per_pass[0]


def test_ratio():
    mean, error = ratio([2.0, 8.0], [1.0, 2.0])
    assert mean == pytest.approx(8**0.5)
    assert error > 0
    assert ratio([3.0, 3.0], [2.0, 2.0]) == (pytest.approx(1.5), pytest.approx(0.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_what_is_recorded(folder, temperature, tmp_path):
    """The answer is the target's own; where nearly all is held, the first candidate mostly is what follows."""
    with TriForce.load(str(folder), "ngram", dtype="float32", context=700) as engine:
        record = record_answer(engine, find_task("explain"), temperature, 1, 500, 24, share=1)
        if temperature == 0:
            answer = engine.generate(record.prompt, max_new_tokens=24, temperature=0.0)
            assert record.answer[: len(answer.token_ids)] == answer.token_ids
    assert sorted(record.offers) == list(range(0, 24, STRIDE))
    hits = []
    for refresh, offers in record.offers.items():
        assert len(offers.tokens) == min(REACH, 24 - refresh)
        assert all(len(tokens) == CANDIDATES for tokens in offers.tokens)
        assert all(scores == sorted(scores, reverse=True) for scores in offers.scores)
        hits += [tokens[0] == record.answer[refresh + n] for n, tokens in enumerate(offers.tokens)]
    assert sum(hits) > 0.75 * len(hits)  # by chance, one of 259
    record.save(tmp_path)
    assert Record.load(tmp_path / record.name) == record


def test_commands(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.growth_replay.TAIL", 8)
    run = CliRunner()
    asked = ("--model", str(folder), "--tokens", "400", "--new-tokens", "32", "--task", "continue", "--seeds", "1")
    result = run.invoke(app, ["record", str(tmp_path / "kept"), *asked, "--temperature", "0.9"])
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "kept").iterdir())) == 1
    by_hand(0).save(tmp_path / "kept")
    result = run.invoke(app, ["replay", str(tmp_path / "kept"), "--way", "topk=1 overlap=0", "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["way"] for row in rows] == ["default", "topk=1 overlap=0"]
    assert rows[0]["ratio"]["mean"] == 1
    assert rows[1]["steps_ahead"] == 0
    assert len(load_records(tmp_path / "kept")) >= 1
    assert run.invoke(app, ["replay", str(tmp_path)]).exit_code == 2
    assert run.invoke(app, ["replay", str(tmp_path / "kept"), "--way", "width:3"]).exit_code == 2
