"""The measuring commands on a tiny shape: what they count is right, and they leave a subject as it was."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from offload_triforce import cli
from offload_triforce.bench import pipeline, shapes
from offload_triforce.bench.subject import Subject
from offload_triforce.bench.timeline import draw, trace_pass, utilisation
from offload_triforce.config import Settings

TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 1000}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", (shapes.LlamaConfig, TINY))
    monkeypatch.setattr(pipeline, "MODELS", {"tiny": 8192})


def call(*arguments):
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.mark.parametrize("resident", [0.0, 0.3])
def test_bytes_of_a_pass(resident):
    """Hand-counted: 3 layers, K and V, 2 heads of 16, 4 bytes; 512 tokens, of which 511 are held, 3 tiles of 128."""
    subject = pipeline.make_subject("tiny", 512, Settings(tile=128, resident=resident))
    plan = subject.runtime.caches.full.stream.plan
    assert subject.runtime.caches.full.tiles == 3
    resident_tiles = sum(plan.is_resident(layer, tile) for layer in range(3) for tile in range(3))
    assert subject.pass_bytes == (9 - resident_tiles) * 128 * 2 * 2 * 16 * 4
    before = subject.device.incoming.moved
    subject.verify()
    assert subject.device.incoming.moved - before == subject.pass_bytes
    subject.draft()
    assert subject.device.incoming.moved - before == subject.pass_bytes, "drafting does without the link"
    subject.close()


def test_coded_bytes_of_a_pass():
    """Hand-counted: 3 layers of 3 tiles of 128 tokens, 2 bytes a number, and what a coded tile takes."""
    subject = pipeline.make_subject("tiny", 512, Settings(tile=128), "bfloat16")
    plan = subject.runtime.caches.full.stream.plan
    assert subject.raw_pass_bytes == 9 * 128 * 2 * 2 * 16 * 2
    assert subject.pass_bytes == 9 * plan.wire_bytes < subject.raw_pass_bytes / 1.3
    before = subject.device.incoming.moved
    subject.verify()
    assert subject.device.incoming.moved - before == subject.pass_bytes
    subject.close()


def test_of_a_hybrid_only_what_attends_crosses_the_link(monkeypatch):
    """Hand-counted: 2 of 8 layers, K and V, 2 heads of 256, 4 bytes; 3 tiles of 128 tokens."""
    values = {**shapes.SHAPES["hybrid-1b"][1], **TINY, "head_dim": 256, "num_hidden_layers": 8}
    values["layer_types"] = values["layer_types"][:8]
    monkeypatch.setitem(shapes.SHAPES, "tiny", (shapes.SHAPES["hybrid-1b"][0], values))
    report = pipeline.bench_pipeline(["tiny"], Settings(tile=128), 512, 13, 2, [0.5], dtypes=["float32"])
    (row,) = report["results"]
    assert row["pass_bytes"] == 2 * 3 * 128 * 2 * 2 * 256 * 4
    assert row["bytes_over_needed"] == 1.0
    assert row["pass_over_link"] >= 1.0


def test_filled_or_read_a_subject_is_ready_and_stays_as_it_is():
    model = shapes.random_model("tiny", torch.float32, torch.device("cpu"), 600)
    for prepare in (Subject.read, Subject.fill):
        subject = Subject(model, Settings(tile=128), torch.arange(500))
        prepare(subject)
        caches = subject.runtime.caches
        held = caches.full.read(1).clone()
        for _ in range(3):
            subject.verify()
            subject.draft()
        assert (caches.length, caches.full.pending, caches.retrieval.pending) == (499, 0, 0)
        assert torch.equal(caches.full.read(1), held)
        assert not held.isnan().any()
        subject.close()


def test_bench_pipeline_json():
    result = call("bench", "pipeline", "--tokens", "600", "--repeats", "2", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [row["dtype"] for row in report["results"]] == ["float32"] * 3 + ["bfloat16"] * 3
    for row in report["results"]:
        assert row["wire_ratio"] == pytest.approx(row["raw_pass_bytes"] / row["pass_bytes"])
        assert row["wire_ratio"] > 1.3 if row["dtype"] == "bfloat16" else row["wire_ratio"] == 1.0
        assert row["bytes_over_needed"] == 1.0
        assert row["pass_over_link"] >= 1.0
        assert row["link_s"] == pytest.approx(row["pass_bytes"] / row["gbps"] / 1e9)
    assert report["machine"]["versions"]["torch"] == torch.__version__


def test_bench_pipeline_table():
    result = call("bench", "pipeline", "--tokens", "600", "--repeats", "1", "--link-gbps", "0.01")
    assert result.exit_code == 0, result.output
    assert "0.01" in result.stdout
    assert "tiny" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "pipeline", "--model", "gpt-9"], "unknown model 'gpt-9'; known are tiny"),
        (["bench", "pipeline", "--link-gbps", "0"], "must be greater than 0"),
        (["bench", "pipeline", "--tile", "7"], "tile must be a multiple of the chunk"),
        (["bench", "pipeline", "--dtype", "int8"], "--dtype must be float32 or bfloat16, not 'int8'"),
        (["bench", "pipeline", "--dtype", "float32", "--wire", "coded"], "this model computes them in float32"),
        (["trace", "--model", "gpt-9"], "unknown model"),
        (["trace", "--out", "/no/such/folder/t.json"], "the folder of /no/such/folder/t.json does not exist"),
        (["trace", "--link-gbps", "-1"], "must be greater than 0"),
    ],
)
def test_mistakes(arguments, words):
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr.replace("\n", " ")


def test_trace(tmp_path):
    """Every tile's copy, every tile's attention, every layer, and the pass as a whole."""
    out, png = tmp_path / "t.json", tmp_path / "t.png"
    arguments = ["--model", "tiny", "--tokens", "600", "--tile", "64", "--link-gbps", "0.05"]
    pytest.importorskip("matplotlib")
    result = call("trace", "--out", str(out), "--png", str(png), *arguments)
    assert result.exit_code == 0, result.output
    events = [event for event in json.loads(out.read_text())["traceEvents"] if event["ph"] == "X"]
    tracks = [event["tid"] for event in events]
    tiles = 3 * 7
    assert sorted(tracks.count(track) for track in set(tracks)) == [1, 3, tiles, tiles]
    assert png.read_bytes().startswith(b"\x89PNG")


def test_pictures_need_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    subject = pipeline.make_subject("tiny", 512, Settings(tile=128))
    trace = trace_pass(subject, 5)
    subject.close()
    with pytest.raises(pipeline.InputError, match="pictures need matplotlib"):
        draw(trace, tmp_path / "x.png", "x")
    assert 0 < utilisation(trace.spans()) <= 1
    assert subject.device.trace is None
