"""The study of MTP drafts, rehearsed: some steps of training, a checkpoint that loads, and figures that add up."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen3_5ForCausalLM

from benchmarks.hybrid import table
from benchmarks.hybrid_model import HELD_OUT, SIZES, held_out_text, library_files, train
from benchmarks.hybrid_study import DRAFTS, Plan, bench_hybrid, is_trained
from offload_triforce.model.mtp_files import load_head
from tests.mtp import needs_heads

pytestmark = needs_heads
SMALL = {"vocab_size": 300, "hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 3, "head_dim": 16}
SMALL |= {"linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "num_key_value_heads": 1}
SMALL |= {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrid")
    assert not is_trained(folder)
    took = train(folder, 1.0, lambda line: None, steps=6, files=12, **SMALL)
    assert is_trained(folder)
    return folder, took


def test_some_steps_of_training(trained):
    """It begins at the vocabulary's own entropy, and learns; what is held out is not among what it reads."""
    folder, took = trained
    assert took["steps"] == 6
    assert took["tokens"] > 4000
    assert took["nats_per_token"] < torch.tensor(300.0).log()
    assert {path.name for path in library_files()} > set(HELD_OUT)
    assert json.loads((folder / "training.json").read_text()) == took
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer(held_out_text()[:500]).input_ids) == held_out_text()[:500]


def test_what_was_trained_is_what_is_read(trained):
    """The head goes into the checkpoint under its names there, and comes out of it as it was."""
    folder, _ = trained
    stored = load_file(folder / "model.safetensors")
    head = load_head(Qwen3_5ForCausalLM.from_pretrained(folder, dtype=torch.float32))
    own = {name: weight for name, weight in stored.items() if name.startswith("mtp.")}
    read = dict(head.module.layers.named_parameters())
    assert len(own) == len(read) == 15
    assert torch.equal(read["0.eh_proj.weight"], own["mtp.fc.weight"])
    assert torch.equal(read["0.mtp_block.mlp.up_proj.weight"], own["mtp.layers.0.mlp.up_proj.weight"])
    assert own["mtp.norm.weight"].abs().max() > 0, "trained"


def test_every_way_says_the_same_and_is_counted(trained):
    folder, _ = trained
    plan = Plan(tokens=2600, new_tokens=12, texts=1, runs=1, temperatures=(0.0, 0.8))
    report = bench_hybrid(folder, plan, lambda line: None)
    cells = {(cell["temperature"], cell["way"]): cell for cell in report["cells"]}
    assert len(cells) == 2 * 2 * len(DRAFTS)
    assert all(cell["same_tokens"] for (temperature, way), cell in cells.items() if way.startswith("ours"))
    assert all(cell["same_tokens"] for (temperature, way), cell in cells.items() if not temperature)
    for (_, way), cell in cells.items():
        assert ("mtp" in cell["by_drafter"]) <= ("MTP" in way)
        assert cell["tokens_per_pass"] == 12 / cell["passes"]
    assert all("mtp" in cells[0.0, f"{base}, MTP"]["by_drafter"] for base in ("ours", "triforce"))
    assert report["memory"]["ours"]["held_bytes"] <= report["memory"]["triforce"]["held_bytes"]
    assert table(report).row_count == len(cells)
    assert json.loads(json.dumps(report)) == report


def test_the_model_is_as_large_as_is_said():
    assert SIZES["layer_types"][-1] == "full_attention", "whose norms are what the head's are made of"
    assert len(SIZES["layer_types"]) == SIZES["num_hidden_layers"]
