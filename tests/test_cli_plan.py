"""The commands ``plan`` and ``doctor``: tables, JSON, and one sentence for each mistake."""

import json

import pytest
from typer.testing import CliRunner

from offload_triforce import cli
from offload_triforce.planner.cards import CARDS
from offload_triforce.planner.models import MODELS
from tests.byte_tokenizer import save_tiny_llama

KEYS = {"fits", "vram_bytes", "host_bytes", "ms_per_token", "ms_per_token_plain", "prefill_s", "missing"}
KEYS |= {"suggestions", "settings", "options", "device", "host", "assumptions", "notes", "tokens_per_pass"}


def call(*args):
    return CliRunner().invoke(cli.app, list(args))


def plan(*args):
    return call("plan", "--model", "llama-3.1-8b", "--gpu", "RTX 4090", "--ram", "64GB", *args)


def test_json_of_what_fits():
    result = plan("--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert set(report) >= KEYS
    assert report["fits"] is True
    assert report["missing"] == report["suggestions"] == []
    assert 0 < report["ms_per_token"] < report["ms_per_token_plain"]
    assert report["vram_bytes"] == sum(report["device"].values()) <= report["vram_limit"]


def test_json_of_what_does_not_fit():
    report = json.loads(plan("--gpu", "RTX 3060", "--json").stdout)
    assert report["fits"] is False
    assert report["ms_per_token"] is report["prefill_s"] is None
    assert report["missing"][0]["what"] == "device memory"
    assert report["missing"][0]["bytes"] == report["vram_bytes"] - report["vram_limit"]
    assert "--quantize nf4" in [row["option"] for row in report["suggestions"]]


def test_tables():
    fits, refused = plan("--context", "64K"), plan("--gpu", "RTX 3060")
    assert fits.exit_code == refused.exit_code == 0
    for words in ("weights", "retrieval cache", "ms per token", "offload-triforce generate --context 65536", "assumed"):
        assert words in fits.stdout
    assert "does not fit" in refused.stdout
    assert "--quantize nf4" in refused.stdout


def test_the_list_of_what_is_known():
    listed = call("plan", "--list")
    assert listed.exit_code == 0
    for name in (*(card.name for card in CARDS), *(model.name for model in MODELS)):
        assert name in listed.stdout


def test_a_local_folder_and_a_draft(tmp_path):
    folder = str(save_tiny_llama(tmp_path))
    result = call("plan", "--model", folder, "--draft", folder, "--vram", "4GB", "--context", "2K", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["fits"] is True
    assert report["device"]["draft"] > 0


@pytest.mark.parametrize("draft", ["none", "self"])
def test_other_drafts_and_given_rates(draft):
    report = json.loads(plan("--draft", draft, "--acceptance", "0.5", "--gamma", "8", "--json").stdout)
    assert report["tokens_per_pass"] == pytest.approx((1 - 0.5**9) / 0.5)
    assert report["settings"]["gamma"] == 8


def test_the_options_are_those_of_generate():
    report = json.loads(plan("--quantize", "nf4", "--json").stdout)
    names = [word for word in report["options"].split() if word.startswith("--")]
    known = CliRunner().invoke(cli.app, ["generate", "--help"], env={"COLUMNS": "200"}).stdout
    assert all(name in known for name in names)
    assert "--quantize nf4" in report["options"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model", "lama-3.1-8"], "nearest are Llama-3.1-8B"),
        (["--gpu", "RTX 4900"], "nearest are"),
        (["--context", "lots"], "128K"),
        (["--ram", "64"], "--ram"),
        (["--link", "25GB"], "--link"),
        (["--vram", ""], "--vram"),
        (["--quantize", "fp8"], "nf4 or int8"),
        (["--dtype", "int4"], "unknown dtype"),
        (["--budget", "16"], "budget 16"),
        (["--resident", "2"], "resident"),
    ],
)
def test_mistakes_are_one_sentence(args, words):
    result = plan(*args)
    assert result.exit_code == 2, result.stdout
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_doctor_in_both_forms(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFLOAD_TRIFORCE_CACHE", str(tmp_path / "models"))
    report = json.loads(call("doctor", "--json").stdout)
    assert {"findings", "measured", "machine"} <= set(report)
    assert {"what", "state", "found", "remedy"} == set(report["findings"][0])
    assert "host memory" in call("doctor").stdout
