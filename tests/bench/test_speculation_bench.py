"""``bench speculation``: its figures are what was counted, its sides are alike in all but what is compared."""

from __future__ import annotations

import json
import statistics
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from offload_triforce import TriForce, cli
from offload_triforce.bench import speculation
from offload_triforce.bench.speculation import (
    LEVERS,
    Answer,
    Plan,
    bench_speculation,
    equal_memory,
    make_ways,
    memory,
    yardstick,
)
from offload_triforce.bench.speculation_report import draw, table
from offload_triforce.bench.tasks import TASKS, common_start, find_task, long_text, loops, prompts
from offload_triforce.config import Settings, replace_settings
from offload_triforce.errors import InputError
from offload_triforce.runtime.reading import Reading
from offload_triforce.runtime.runtime import Runtime
from offload_triforce.runtime.session import Session
from offload_triforce.speculation.stats import DecodeStats
from tests.byte_tokenizer import byte_tokenizer, save_tiny_llama
from tests.tiny import prompt_ids, tiny_model

TOKENS = 1024


def chatty():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<me>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<you>{% endif %}"
    )
    return tokenizer


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A random model that reads bytes, under the name of a known one; texts may be short."""
    folder = save_tiny_llama(tmp_path)
    chatty().save_pretrained(folder)
    monkeypatch.setattr(speculation, "find_source", lambda name: str(folder))
    monkeypatch.setattr(speculation, "MODELS", {"smollm2": speculation.BenchModel("smollm2", TOKENS)})
    monkeypatch.setattr(speculation, "SHARE", 8)


def run(temperatures=(0.0, 0.8), tasks=("explain", "chat"), levers=False, **options):
    plan = Plan([find_task(name) for name in tasks], temperatures, 10, 2, None, levers)
    return bench_speculation(["smollm2"], plan, Settings(draft_cost=0.05), **options)


# --- the matrix


def test_figures_are_what_was_counted(tiny):
    kept = []
    report = run(keep=lambda report: kept.append(len(report["cells"])))
    assert kept == [2, 4], "after each text"
    assert [(cell["task"], cell["temperature"]) for cell in report["cells"]] == [
        ("explain", 0.0), ("explain", 0.8), ("chat", 0.0), ("chat", 0.8),
    ]  # fmt: skip
    for cell in report["cells"]:
        assert cell["ratio"] == cell["tokens_per_pass"] / cell["tokens_per_pass_triforce"]
        for way in cell["ways"].values():
            assert way["answers"] == (1 if cell["temperature"] == 0 else 2)
            assert way["tokens_per_pass"] == way["new_tokens"] / way["passes"]
            assert way["spread"][0] <= way["tokens_per_pass"] <= way["spread"][1]
            assert way["link_bytes_per_token"] > 0
            assert 0 < way["draft_share"] < 1
        assert cell["temperature"] > 0 or cell["same_tokens"]
        reference = cell["ways"]["triforce"]  # chains of 12, and nothing ahead
        assert reference["draft_tokens_per_pass"] <= 12
        assert reference["steps_ahead_per_pass"] == 0
        assert cell["ways"]["ours"]["draft_tokens_per_pass"] > 12
    counted = [cell["ratio"] for cell in report["cells"] if not cell["looped"]]
    assert report["mean_ratio_with_loops"] == statistics.mean(cell["ratio"] for cell in report["cells"])
    if counted:
        assert report["mean_ratio"] == statistics.mean(counted)
        assert report["least_ratio"] == min(counted)
    assert json.loads(json.dumps(report)) == report


LOOP, PROSE = [5, 6] * 15, [*range(30)]


def cell_of(ours, reference, temperature=0.8):
    """A cell by hand: each way's answers as (tokens, passes)."""
    answers = {
        way: [Answer(tokens, "", DecodeStats(new_tokens=len(tokens), passes=n, decode_s=1.0)) for tokens, n in given]
        for way, given in (("ours", ours), ("triforce", reference))
    }
    return speculation._cell("smollm2", TASKS[0], temperature, answers, 0.01)


def test_answers_in_loops_are_left_out_where_others_are_not():
    cell = cell_of([(LOOP, 1), (PROSE, 3), (PROSE, 5)], [(PROSE, 6), (PROSE, 6), (PROSE, 12)])
    assert (cell["tokens_per_pass"], cell["tokens_per_pass_triforce"]) == (60 / 8, 90 / 24)
    assert cell["ratio"] == 2.0
    assert not cell["looped"]
    assert cell["ways"]["ours"]["spread"] == [6.0, 10.0]


def test_cells_in_loops_are_left_out_of_the_means():
    """Half of the answers of either way are enough."""
    looped = cell_of([(PROSE, 3), (PROSE, 3)], [(LOOP, 30), (PROSE, 30)])
    assert looped["looped"]
    report = {"cells": [looped]}
    speculation._summarise(report)
    assert "mean_ratio" not in report
    assert "every answer fell into a loop" in str(table(report).title)
    report["cells"] += [cell_of([(PROSE, 3)], [(PROSE, 6)]), cell_of([(PROSE, 3)], [(PROSE, 9)])]
    speculation._summarise(report)
    assert (report["mean_ratio"], report["least_ratio"]) == (2.5, 2.0)
    assert report["mean_ratio_with_loops"] == pytest.approx((10 + 2 + 3) / 3)
    assert report["mean_ratio_by_way"] == {"ours": 2.5, "triforce": 1.0}


def test_tokens_that_differ_are_told():
    assert cell_of([(PROSE, 3)], [(PROSE, 6)], 0.0)["same_tokens"]
    assert not cell_of([(PROSE, 3)], [(PROSE[::-1], 6)], 0.0)["same_tokens"]


def test_share_of_drafting_by_hand():
    """40 steps of which 10 were hidden, at a hundredth of a pass each, in 3 passes."""
    stats = DecodeStats(new_tokens=30, passes=3, steps=40, steps_ahead=10)
    assert speculation._figures([Answer(PROSE, "", stats)], 0.01)["draft_share"] == pytest.approx(0.3 / 3.3)


def test_levers(tiny):
    report = run(temperatures=(0.0,), tasks=("explain",), levers=True)
    (cell,) = report["cells"]
    assert len(cell["ways"]) == 2 + 2 * len(LEVERS)
    assert cell["same_tokens"], "greedy answers do not depend on how they were drafted"
    assert report["mean_ratio_by_way"]["triforce"] == 1.0 if "mean_ratio_by_way" in report else cell["looped"]


# --- both sides


@given(st.sampled_from([4, 8, 16]), st.sampled_from([4, 8, 16]), st.sampled_from([64, 80, 128]), st.integers(128, 9000))
def test_equal_memory_is_never_more_and_nearly_all_of_it(bits, chunk, head_dim, budget):
    reference = Settings.triforce(budget=budget)
    chosen = equal_memory(Settings(bits=bits, chunk=chunk, sink=16), reference, head_dim)
    theirs = memory(reference, head_dim)["held_bytes"]
    one_more = replace_settings(chosen, {"budget": chosen.budget + chunk})
    if chosen.budget >= chosen.least_budget:
        assert memory(chosen, head_dim)["held_bytes"] <= theirs
    assert memory(one_more, head_dim)["held_bytes"] > theirs


def test_room_for_no_chunk():
    """A sink of the whole budget: nothing is left, and not less than nothing."""
    reference = Settings.triforce(budget=128)
    assert equal_memory(Settings(sink=128), reference, 64).budget == 128 + 64


def test_ways_differ_in_their_lever_and_in_the_budget_alone():
    settings, reference = Settings(draft_cost=0.01), yardstick(131072, draft_cost=0.01)
    assert reference.budget == 4096
    ways = make_ways(settings, reference, 128, levers=True)
    assert memory(ways["ours"], 128)["held_bytes"] <= memory(reference, 128)["held_bytes"]
    assert ways["ours"].budget > 3 * reference.budget
    for lever, names in LEVERS.items():
        for way, base in ((f"only {lever}", "triforce"), (f"no {lever}", "ours")):
            changed = {name for name, value in vars(ways[way]).items() if value != getattr(ways[base], name)}
            assert changed
            assert changed <= {*names, "budget"}, way
    assert all(any(vars(settings)[n] != vars(reference)[n] for n in names) for names in LEVERS.values())
    differing = {name for name, value in vars(settings).items() if value != getattr(reference, name)}
    assert differing - {"budget"} <= {name for names in LEVERS.values() for name in names}, "each difference is a lever"


def test_a_reading_fills_a_runtime_as_its_own_prefill_would():
    model, prompt = tiny_model(seed=1, calm=True), prompt_ids(300)[0].tolist()
    settings = Settings(budget=96, tile=32, gamma=6, draft_cost=0.05)
    with TriForce(model, draft="none", settings=settings) as engine:
        expected = engine.generate(prompt, max_new_tokens=40, temperature=0.9, seed=3)
        reading = Reading.of(model, engine.layout, prompt[:270])
        runtime = Runtime(model, engine.layout, settings, 350)
        for _ in range(2):  # as often as one likes
            session = Session(runtime)
            session.begin_as_read(reading, prompt[270:-1])
            stream = engine.resume(session, prompt, 3, max_new_tokens=40, temperature=0.9)
            assert list(stream) == []
            assert stream.result.token_ids == expected.token_ids
        assert torch.equal(runtime.caches.full.read(0)[:, :, :270], reading.layers[0][0])
        runtime.close()


# --- tasks


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ([*range(50)], False),
        ([*range(20), *[1, 2, 3] * 8], True),
        ([*range(20), *[7] * 24], True),
        ([*range(20), *[7] * 12, *range(30)], False),  # a short stretch of one token is not a loop
        ([*[*range(30)] * 3], True),
        ([*[*range(30)] * 2, *range(60, 90)], False),  # said twice only
        ([], False),
    ],
)
def test_loops(tokens, found):
    assert loops(tokens) is found


def test_prompts_on_one_text_begin_alike():
    """What they share is read once: also with the task that has no question."""
    asked = prompts(chatty(), TASKS, 2000)
    for kind in ("code", "manual"):
        group = [ids for task, ids in asked.items() if task.text == kind]
        assert common_start(group) >= 1900
    assert len(asked) == 5


def test_there_is_text_for_the_longest_model():
    assert len(long_text("code", byte_tokenizer(), 60_000)) == 60_000
    with pytest.raises(InputError, match="ask for fewer"):
        long_text("manual", byte_tokenizer(), 10**8)


# --- the command


def call(*arguments):
    return CliRunner().invoke(cli.app, ["bench", "speculation", *arguments])


def test_command(tiny, tmp_path):
    out, png = tmp_path / "out.json", tmp_path / "out.png"
    options = ("--task", "explain", "--temperature", "0", "--new-tokens", "8", "--runs", "1")
    result = call(*options, "--out", str(out), "--png", str(png), "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report == json.loads(out.read_text())
    assert png.stat().st_size > 5000
    (cell,) = report["cells"]
    assert {"task", "model", "temperature", "tokens_per_pass", "tokens_per_pass_triforce"} <= set(cell)
    draw(report, png)
    assert "explain" in call(*options).stdout


def test_a_picture_that_cannot_be_drawn_is_refused_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(speculation, "find_source", lambda name: pytest.fail("the work has begun"))
    result = call("--png", str(tmp_path / "out.png"))
    assert result.exit_code == 2
    assert "pictures need matplotlib" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "gpt"), "'gpt' is neither a local folder or GGUF file nor"),
        (("--task", "sing"), "unknown task 'sing'; known are explain, continue, edit, question, chat"),
        (("--temperature", "-1"), "--temperature must not be negative"),
        (("--draft-cost", "0"), "draft_cost must be greater than 0"),
        (("--out", "no/such/folder/a.json"), "the folder of no/such/folder/a.json does not exist"),
        (("--tokens", "600"), "texts of 600 tokens are too short to compare on; take at least 4,096"),
    ],
)
def test_mistakes_get_one_sentence(arguments, words):
    result = call(*arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())


def test_a_runtimes_own_rule_counts():
    """The yardstick resamples, whatever the engine that it is run by does: at a temperature the texts differ."""
    model, prompt = tiny_model(seed=1, calm=True), prompt_ids(300)[0].tolist()
    said = []
    with TriForce(model, draft="none") as engine:
        reading = Reading.of(model, engine.layout, prompt[:-1])
        for rule in ("coupled", "resampled"):
            runtime = Runtime(model, engine.layout, Settings(budget=96, tile=32, rule=rule, draft_cost=0.05), 350)
            session = Session(runtime)
            session.begin_as_read(reading)
            stream = engine.resume(session, prompt, 3, max_new_tokens=40, temperature=1.0)
            assert list(stream) == []
            said.append(stream.token_ids)
            runtime.close()
        plain = Settings(budget=96, tile=32, rule="resampled", draft_cost=0.05)
        with TriForce(model, draft="none", settings=plain) as other:
            assert other.generate(prompt, max_new_tokens=40, temperature=1.0, seed=3).token_ids == said[1]
    assert said[0] != said[1]
