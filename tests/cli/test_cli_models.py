"""The command ``models``: the one table of names, for people and as JSON."""

import json

import pytest

from offload_triforce.machine.folders import cache_folder
from offload_triforce.model.names import MODELS
from tests.cli.calling import call


@pytest.fixture(autouse=True)
def nothing_here(monkeypatch, tmp_path):
    monkeypatch.setenv("OFFLOAD_TRIFORCE_CACHE", str(tmp_path / "models"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def test_all_of_them_within_80_columns():
    listed = call("models")
    assert listed.exit_code == 0
    assert max(map(len, listed.stdout.splitlines())) <= 80
    rows = {line.split()[0]: line.split() for line in listed.stdout.splitlines() if line.strip()}
    for model in MODELS:
        shown = rows[model.name][1]
        assert model.ids[0].startswith(shown)
        assert shown == model.ids[0] or model.ids[0][len(shown) :] in rows  # on a line of its own
    assert rows["llama-3.1-8b"][2:] == ["8.03", "131", "128K", "no"]


def test_as_json_and_what_is_here():
    rows = {row["name"]: row for row in json.loads(call("models", "--json").stdout)["models"]}
    assert list(rows) == [model.name for model in MODELS]
    gemma = rows["gemma-3-12b"]
    assert (gemma["layers"], gemma["windowed_layers"], gemma["kv_bytes_per_token"]) == (48, 40, 4 * 8 * 256 * 8)
    assert all(row["here"] is None for row in rows.values())
    wheels = MODELS[0].wheels
    kept = cache_folder() / wheels.file
    kept.parent.mkdir(parents=True)
    with kept.open("wb") as file:
        file.truncate(wheels.size)
    (row,) = [row for row in json.loads(call("models", "--json").stdout)["models"] if row["here"]]
    assert (row["name"], row["here"]) == ("smollm2", str(kept))
