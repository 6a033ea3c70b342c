"""The commands ``plan`` and ``doctor``: verdict, tables, JSON, and one sentence for each mistake."""

import json
import shlex

import pytest
from typer.testing import CliRunner

from offload_triforce import cli
from offload_triforce.machine.cards import CARDS
from offload_triforce.machine.packages import reads_mtp_heads
from offload_triforce.model.names import MODELS
from tests.byte_tokenizer import save_tiny_llama
from tests.cli.calling import call
from tests.mtp import save_with_head
from tests.tiny_gguf import save_tiny_gguf

KEYS = {"fits", "vram_bytes", "host_bytes", "ms_per_token", "ms_per_token_plain", "prefill_s", "missing"}
KEYS |= {"suggestions", "settings", "options", "device", "host", "assumptions", "notes", "tokens_per_pass"}
KEYS |= {"verdict", "command", "way", "on_card", "pays_from", "loading", "device_plain"}


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
    phases = max(report["prefill_bytes"], report["decoding_bytes"])
    assert report["vram_bytes"] == phases <= report["vram_limit"]
    assert phases < sum(report["device"].values()), "no phase holds what the other needs"


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
    for words in ("weights", "retrieval cache", "ms per token", "--context 65536", "assumed"):
        assert words in fits.stdout
    assert fits.stdout.startswith("Fits: ")
    assert refused.stdout.startswith("Does not fit: ")
    assert "--quantize nf4" in refused.stdout


def test_the_verdict_comes_first_and_is_one_sentence():
    for args in ([], ["--context", "16K"], ["--gpu", "RTX 3060"]):
        report, said = json.loads(plan(*args, "--json").stdout), plan(*args).stdout
        assert said.splitlines()[0] == report["verdict"]
        assert report["verdict"].endswith(".")
        assert ". " not in report["verdict"]


@pytest.mark.parametrize("args", [[], ["--context", "16K"], ["--draft", "ngram+self", "--quantize", "int8"]])
def test_the_command_is_one_line_that_a_shell_takes_apart_again(args):
    report, lines = json.loads(plan(*args, "--json").stdout), plan(*args).stdout.splitlines()
    assert report["command"] in lines
    words = shlex.split(report["command"])
    assert words[:4] == ["offload-triforce", "generate", "--model", "llama-3.1-8b"]
    assert "--prompt-file" in words
    assert words[-len(shlex.split(report["options"])) :] == shlex.split(report["options"])


def test_the_command_runs_as_it_is_printed(tmp_path):
    """Quoted for a shell: a folder with a space, brackets and an apostrophe in its name."""
    folder = save_tiny_llama(tmp_path / "it's [my] model", eos_token_id=None)
    args = ["--vram", "4GB", "--context", "600", "--draft", "self", "--dtype", "float32", "--gamma", "4"]
    result = call("plan", "--model", str(folder), *args)
    assert result.exit_code == 0, result.stderr
    (command,) = [line for line in result.stdout.splitlines() if line.startswith("offload-triforce generate")]
    (tmp_path / "prompt.txt").write_text("To be, or not to be. " * 20)
    words = shlex.split(command.replace("prompt.txt", shlex.quote(str(tmp_path / "prompt.txt"))))
    done = call(*words[1:], "--device", "cpu", "--max-new-tokens", "8")
    assert done.exit_code == 0, done.stderr


def test_a_command_that_would_be_refused_is_not_printed():
    result = call("plan", "--model", "qwen3-8b", "--gpu", "RTX 4090", "--context", "64K")
    assert "`generate` refuses more than the model's 40,960 positions" in result.stdout.splitlines()[0]
    assert "offload-triforce generate" not in result.stdout


def test_lengths_sizes_and_speeds_are_read_as_everywhere():
    said = {
        plan("--context", context, "--vram", vram, "--link", link, "--json").stdout
        for context, vram, link in (
            ("128K", "24GB", "25GB/s"),
            ("131,072", "24G", "25 GB/s"),
            ("131072", "24,000MB", "200Gb/s"),
        )
    }
    assert len({json.dumps({**json.loads(text), "assumptions": None}) for text in said}) == 1
    both = [json.loads(plan("--budget", budget, "--tile", "2K", "--json").stdout) for budget in ("4096", "4K")]
    assert both[0] == both[1]
    assert (both[0]["settings"]["budget"], both[0]["settings"]["tile"]) == (4096, 2048)


def test_a_gguf_file_is_said_to_be_unpacked(tmp_path):
    path = save_tiny_gguf(tmp_path / "tiny.gguf")
    result = call("plan", "--model", str(path), "--vram", "4GB", "--context", "2K", "--quantize", "nf4")
    assert result.exit_code == 0, result.stderr
    assert (
        "tiny.gguf (0.00 GB) is unpacked to bfloat16 in host memory on loading: 0.00 GB, and packed to nf4"
        in result.stdout
    )


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


LARGE = ("--gpu", "RTX 4090", "--ram", "128GB", "--quantize", "nf4", "--context", "256K", "--json")


@pytest.mark.skipif(not reads_mtp_heads(), reason="this release of transformers reads no MTP heads")
def test_a_checkpoint_with_a_head():
    """Its memory, its time, and a command that says no more than it must: what is taken by default."""
    reports = {
        draft: json.loads(call("plan", "--model", "qwen3.6-27b", "--draft", draft, *LARGE).stdout)
        for draft in ("auto", "mtp", "ngram+mtp", "ngram")
    }
    assert reports["auto"]["device"]["draft"] == pytest.approx(2 * 424_699_392, rel=0.01)
    assert reports["auto"]["device"] == reports["mtp"]["device"] == reports["ngram+mtp"]["device"]
    assert "draft" not in reports["ngram"]["device"]
    assert "accepts 65% of the draft's tokens (mtp)" in str(reports["auto"]["assumptions"])
    assert "--draft" not in reports["auto"]["command"]
    assert "--draft mtp" in reports["mtp"]["command"]


@pytest.mark.parametrize("draft", ["mtp", "mtp+ngram"])
def test_a_model_without_a_head(draft):
    result = call("plan", "--model", "qwen3-8b", "--draft", draft, *LARGE)
    assert result.exit_code == 2
    assert "Qwen3-8B has no MTP head" in result.stderr


@pytest.mark.skipif(not reads_mtp_heads(), reason="this release of transformers reads no MTP heads")
def test_a_folder_with_a_head_and_one_that_lost_it(tmp_path):
    """What lies there counts, not what the configuration says."""
    options = ("--vram", "4GB", "--context", "2K", "--json")
    whole = save_with_head(tmp_path / "whole")
    report = json.loads(call("plan", "--model", whole, "--draft", "mtp", *options).stdout)
    assert report["device"]["draft"] > 0
    chosen = call("plan", "--model", whole, "--draft", "auto", *options[:-1]).stdout
    assert "--draft auto takes look-up alone" in chosen  # nothing of so small a model crosses the link
    lost = save_with_head(tmp_path / "lost", leave_out=True)
    assert "draft" not in json.loads(call("plan", "--model", lost, "--draft", "auto", *options).stdout)["device"]


@pytest.mark.parametrize("draft", ["none", "self"])
def test_other_drafts_and_given_rates(draft):
    report = json.loads(plan("--draft", draft, "--acceptance", "0.5", "--gamma", "8", "--json").stdout)
    assert report["acceptance_by_rank"][0] == pytest.approx(0.5)
    assert (1 - 0.5**9) / 0.5 < report["tokens_per_pass"] <= 1.1 * report["tokens_per_pass_undelayed"] < 9
    assert report["settings"]["gamma"] == 8
    assert 0 <= report["hidden_steps_per_pass"] < report["steps_per_pass"]


def test_the_wire_is_chosen_told_and_handed_on():
    auto, raw = (json.loads(plan(*args, "--gamma", "8", "--json").stdout) for args in ([], ["--wire", "raw"]))
    assert auto["wire_ratio"] > 1.38 > 1 == raw["wire_ratio"]
    assert auto["host"]["tiles of the full cache"] < 0.75 * raw["host"]["tiles of the full cache"]
    assert auto["pass_link_s"] < 0.75 * raw["pass_link_s"]
    assert "--wire raw" in raw["command"]
    assert "--wire" not in auto["command"]


def test_the_options_are_those_of_generate():
    report = json.loads(plan("--quantize", "nf4", "--json").stdout)
    names = [word for word in report["options"].split() if word.startswith("--")]
    known = CliRunner().invoke(cli.app, ["generate", "--help"], env={"COLUMNS": "200"}).stdout
    assert all(name in known for name in names)
    assert "--quantize nf4" in report["options"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model", "lama-3.1-8"], "nearest are llama-3.1-8b"),
        (["--model", "nobody/none"], "the hub is not to be asked"),
        (["--draft", "nobody/none"], "'nobody/none' is neither"),
        (["--gpu", "RTX 4900"], "nearest are"),
        (["--context", "lots"], "128K"),
        (["--ram", "64"], "--ram"),
        (["--link", "25GB"], "--link"),
        (["--link", "25gbps"], "bytes or bits"),
        (["--vram", "24Gb"], "is in bits"),
        (["--context", "131.072"], "is not a number of tokens"),
        (["--context", "1"], "context must be a whole number of at least 2"),
        (["--vram", ""], "--vram"),
        (["--quantize", "fp8"], "nf4 or int8"),
        (["--dtype", "int4"], "unknown dtype"),
        (["--budget", "16"], "budget 16"),
        (["--resident", "2"], "resident"),
    ],
)
def test_mistakes_are_one_sentence(args, words, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
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


def test_a_packed_head_is_planned_and_suggested():
    """Where nf4 alone leaves too little room, and in the command to paste."""
    where = ["--gpu", "RTX 4070 Ti Super", "--vram", "8.5GB", "--ram", "64GB", "--context", "32K", "--json"]
    asked = ["plan", "--model", "mistral-nemo", *where]
    found = json.loads(call(*asked).stdout)
    options = [row["option"] for row in found["suggestions"]]
    assert not found["fits"]
    assert "--quantize nf4" not in options
    assert "--quantize nf4 --quantize-head int8" in options
    packed = json.loads(call(*asked, "--quantize", "nf4", "--quantize-head", "int8").stdout)
    assert packed["fits"]
    assert (packed["quantize"], packed["quantize_head"]) == ("nf4", "int8")
    assert "--quantize nf4 --quantize-head int8" in packed["command"]
    half = json.loads(call(*asked, "--quantize", "nf4").stdout)
    assert half["device"]["weights"] - packed["device"]["weights"] == 131072 * (5120 - 4)
    assert "--quantize nf4 --quantize-head int8" in [row["option"] for row in half["suggestions"]]
