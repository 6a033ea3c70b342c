"""``bench prediction``: what it takes apart adds up, and the cost model is right about passes and whole answers."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from offload_triforce import cli
from offload_triforce.bench.prediction import PASS, Works, bench_prediction, from_counts, from_rates, split, step_like
from offload_triforce.config import Settings
from offload_triforce.scheduler.cost import PassWork, chain, rounds
from offload_triforce.scheduler.device import COMPUTE
from offload_triforce.scheduler.trace import Span
from offload_triforce.stats import Acceptance, DecodeStats
from tests.byte_tokenizer import save_tiny_llama


@pytest.fixture(scope="module", autouse=True)
def no_gpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


def test_a_time_line_is_taken_apart():
    """2 layers of 2 tiles: 1 s before the first, 3 s in between, 5 s after; tiles take 1 s, one after a pause."""
    tiles = [(2.0, 3.0), (3.0, 4.0), (7.0, 8.0), (8.5, 9.5)]
    spans = [Span(PASS, PASS, 1.0, 14.5), *(Span(COMPUTE, "", *times) for times in tiles)]
    assert split(spans, 2, 2) == [1.0, 3.0, 5.0, (2.0 + 2.5) / 4]
    assert sum(split(spans, 2, 2)[:3]) + 4 * 4.5 / 4 == 13.5, "nothing is lost"


def test_between_what_was_measured_are_straight_lines():
    works = Works.__new__(Works)
    works._seen = {1: PassWork((1.0, 2.0), 0.5), 5: PassWork((3.0, 2.0), 1.5), 9: PassWork((3.0, 4.0), 1.5)}
    assert works.of(3) == PassWork((2.0, 2.0), 1.0)
    assert works.of(7) == PassWork((3.0, 3.0), 1.5)
    assert works.of(9) == works._seen[9]
    works._seen = {1: PassWork((1.0, 2.0), 0.5)}
    assert works.of(1) == works._seen[1]


RUN = DecodeStats(new_tokens=40, passes=10, steps=90, steps_ahead=20)
RUN.draft, RUN.retrieval = Acceptance(100, 60, 45), Acceptance(120, 38, 30)


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
    """Of 180 guesses that the draft was asked for, 45 were accepted; of the retrieval level's, 30 of 38 judged."""
    told = from_rates(RUN, Settings.triforce(), 2.0, 0.1)
    assert (told.steps, told.tokens) == (rounds(12, 2, 0.25), chain(30 / 38, 12))


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
    plain, triforce, _ = report["answers"]
    assert plain["tokens_per_pass"] == 1.0
    assert triforce["predicted_from_rates"] > 0
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
