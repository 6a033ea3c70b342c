"""What doctor says of machines that are not here: nvidia-smi's answers as text."""

import pytest
import torch

from offload_triforce import doctor

GOOD = "NVIDIA GeForce RTX 4090, 550.54, 1, 4, 16, 16\n"


@pytest.mark.parametrize(
    ("line", "state", "words"),
    [
        (GOOD, "ok", "gen 4 x16"),
        ("RTX 4090, 550.54, 4, 4, 8, 16", "slow", "x8 costs 50%"),
        ("RTX 3090, 550.54, 1, 3, 16, 16", "slow", "PCIe 4.0"),
        ("RTX 3090, 550.54, [N/A], [N/A], [N/A], [N/A]", "note", "does not say"),
    ],
)
def test_slots(line, state, words):
    found = doctor.check_slot(doctor.read_answer(line))
    assert found.state == state
    assert words in f"{found.found} {found.remedy}"
    assert (found.remedy is None) == (state in ("ok", "note"))


@pytest.mark.parametrize("text", ["", "no devices were found", "a, b"])
def test_answers_that_are_none(text):
    assert doctor.read_answer(text) is None


@pytest.mark.parametrize(("gbps", "state"), [(24.0, "ok"), (12.0, "slow")])
def test_measured_link_against_the_slot(gbps, state):
    assert doctor.check_link_speed(gbps, doctor.read_answer(GOOD)).state == state


def test_torch_without_cuda_beside_a_driver(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    rows = {row.what: row for row in doctor.check_gpu(doctor.read_answer(GOOD))}
    assert rows["NVIDIA driver"].state == "ok"
    assert rows["torch"].state == "missing"
    assert "CUDA" in rows["torch"].remedy
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "12.8" in {row.what: row for row in doctor.check_gpu(doctor.read_answer(GOOD))}["torch"].remedy


def test_no_driver(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.ask_driver() is None
    assert [row.state for row in doctor.check_gpu(None)] == ["missing"]


def test_wsl_and_missing_packages(monkeypatch):
    assert doctor.check_wsl("5.15.0-microsoft-standard-WSL2").state == "slow"
    assert doctor.check_wsl("6.8.0-generic") is None
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert doctor.check_triton().state == "slow"
    assert doctor.check_quantiser().state == "note"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_on_a_cpu_it_measures_host_memory_and_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFLOAD_TRIFORCE_CACHE", str(tmp_path / "models"))
    report = doctor.examine()
    assert report["measured"]["host_memory_gbps"] > 0.1
    assert "No card" in report["measured_lines"][0]
    assert list(tmp_path.iterdir()) == []
    for row in report["findings"]:
        assert row["state"] in ("ok", "slow", "missing", "note")
        assert row["remedy"] or row["state"] in ("ok", "note"), row
