"""``bench prediction``: the cost model is right about passes and whole answers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from offload_triforce import cli
from offload_triforce.bench.prediction import bench_prediction, from_counts, from_rates, step_like
from offload_triforce.config import Settings
from offload_triforce.planner.rounds import Costs, PassCurve
from offload_triforce.scheduler.simulate import PassTime, chain, rounds
from offload_triforce.speculation.stats import Acceptance, DecodeStats
from tests.byte_tokenizer import save_tiny_llama


@pytest.fixture(scope="module", autouse=True)
def no_gpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


RUN = DecodeStats(new_tokens=40, passes=10, steps=90, steps_ahead=20)
RUN.draft, RUN.retrieval = Acceptance(100, 60, 45), Acceptance(120, 38, 30)
RUN.ranks = [32, 4, 2, 1, 1]


def test_wider_steps_take_longer():
    """Free: 10 tokens in 5 steps of 0.1 s. A run with 4 tokens in each, at 0.01 s for another one."""
    free = DecodeStats(steps=5, step_tokens=10, draft_s=0.5)
    assert step_like(DecodeStats(steps=3, step_tokens=12), free, 0.01) == pytest.approx(0.12)
    assert step_like(DecodeStats(), free, 0.01) == 0.0


def test_rounds_from_counts():
    """70 of 90 steps were not hidden: 7 for each of 10 passes, and 4 tokens."""
    told = from_counts(RUN, 2.0, 0.1)
    assert told.ms_per_token == pytest.approx(1e3 * 2.7 / 4)


def test_rounds_from_acceptance():
    """The first choice was taken in 32 of 40 places. Level 0 drafts in 100 / 180 of the steps, and 0.75 of it is right
    as long as nothing before is wrong: alone among the steps, that would be 12 / 1.73."""
    costs = Costs(PassCurve((1, 13), (PassTime(2.0, 1.0, 1.0),) * 2), 1.0, 0.1, 0.0)
    told = from_rates(RUN, Settings.triforce(), costs, 4000)
    assert told.tokens == pytest.approx(chain(0.8, 12), rel=0.06)
    assert rounds(12, 2, 0.75) < told.steps < rounds(12, 2, 0.0)
    assert told.step_s == pytest.approx(0.1)
    few = replace(RUN, ranks=[20, 10, 5, 2, 3])
    assert from_rates(few, Settings.triforce(), costs, 4000).tokens == pytest.approx(chain(0.5, 12), rel=0.06)
    tree = from_rates(few, Settings(), costs, 4000)
    assert tree.tokens > 1.5 * chain(0.5, 12), "second choices are there as well"
    assert tree.hidden > 0


def test_report(tmp_path):
    """On a tiny model, whatever its times are: every row is there, and the threads are as before."""
    folder, out = save_tiny_llama(tmp_path, vocab_size=1000, max_position_embeddings=4096), tmp_path / "p.json"
    before = torch.get_num_threads()
    given = ["--tokens", "600", "--new-tokens", "8", "--link-gbps", "0.05", "--out", str(out)]
    command = ["bench", "prediction", "--model", str(folder), *given]
    result = CliRunner().invoke(cli.app, command, env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.stderr
    assert torch.get_num_threads() == before
    report = json.loads(out.read_text())
    assert report["link"] == "emulated"
    assert [row["queries"] for row in report["passes"]] == [1, 13, 193]
    assert [row["way"] for row in report["answers"]] == ["plain", "triforce", "best"]
    for row in report["passes"] + report["answers"]:
        assert row["ratio"] == pytest.approx(row["predicted"] / row["measured"])
        assert row["predicted"] > 0
    plain, triforce, best = report["answers"]
    assert plain["tokens_per_pass"] == 1.0
    assert "predicted_from_rates" not in plain
    for row in (triforce, best):
        assert row["ratio_from_rates"] == pytest.approx(row["predicted_from_rates"] / row["measured"])
        assert row["predicted_from_rates"] > 0
        assert 0 < sum(row["ranks"]) <= 8
    assert "triforce, per token" in result.stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--link-gbps", "0"], "must be greater than 0"),
        (["--out", "/nowhere/p.json"], "does not exist"),
        (["--model", "./nowhere"], "no such file"),
        (["--tokens", "9000"], "8,192"),
    ],
)
def test_mistakes_are_one_sentence(args, words):
    result = CliRunner().invoke(cli.app, ["bench", "prediction", *args])
    assert result.exit_code == 2, result.stdout
    assert words in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")


@pytest.mark.slow  # a matter of time: on a machine that is busy with other things it is later
def test_smollm2_takes_as_long_as_predicted():
    """Passes within 5 %, whole answers within 10 %."""
    report = bench_prediction("smollm2", 2000, 24, None)
    for row in report["passes"]:
        assert row["ratio"] == pytest.approx(1.0, abs=0.05), row
    for row in report["answers"]:
        assert row["ratio"] == pytest.approx(1.0, abs=0.10), row
