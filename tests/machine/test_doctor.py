"""What doctor says of machines that are not here: nvidia-smi's answers as text."""

from types import SimpleNamespace

import pytest
import torch

from offload_triforce.errors import MemoryLimitError
from offload_triforce.machine import doctor, packages
from offload_triforce.machine.hardware import Measured, read_measured

ERRORS = {"PackageNotFoundError": packages.metadata.PackageNotFoundError}
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


@pytest.mark.parametrize(
    ("version", "card", "state", "words"),
    [
        (None, False, "note", "would not be used"),
        (None, True, "slow", "pip install 'offload-triforce[hybrid]'"),
        ("0.6.0", True, "ok", "there"),
        ("0.5.0", True, "ok", "there"),
        ("0.4.2", True, "slow", "pip install -U fla-core"),
        ("0.4.2", False, "slow", "pip install -U fla-core"),
    ],
)
def test_kernels_for_hybrid_models(version, card, state, words, monkeypatch):
    def versions(name):
        if version is None:
            raise ERRORS["PackageNotFoundError"](name)
        return version

    monkeypatch.setattr(packages, "metadata", SimpleNamespace(version=versions, **ERRORS))
    monkeypatch.setattr(doctor, "too_old_fla", packages.too_old_fla.__wrapped__)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: version and name == "fla" and object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card)
    found = doctor.check_hybrid()
    assert found.state == state
    assert words in f"{found.found} {found.remedy}"


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


def test_on_a_card_it_measures_and_keeps(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFLOAD_TRIFORCE_CACHE", str(tmp_path / "models"))
    properties = SimpleNamespace(name="NVIDIA GeForce RTX 4090", total_memory=25 * 10**9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(doctor, "link_ceiling", lambda device, size: {"h2d_gbps": 24.5, "d2h_gbps": 23.5})
    monkeypatch.setattr(doctor, "time", SimpleNamespace(strftime=lambda form: "2026-01-01"))
    # The real one, on the CPU: what it returns is what is kept.
    real = doctor.memory_bandwidth
    monkeypatch.setattr(doctor, "memory_bandwidth", lambda device: real(torch.device("cpu"), 1 << 20))
    measured, lines = doctor.measure()
    assert measured["h2d_gbps"] == 24.5
    assert measured["memory_gbps"] > 0
    assert read_measured() == Measured(**measured)
    assert "24.5 GB/s to the card" in lines[0]
    monkeypatch.setenv("OFFLOAD_TRIFORCE_CACHE", "/proc/nowhere/models")
    measured, lines = doctor.measure()
    assert measured["h2d_gbps"] == 24.5
    assert "but not kept for `plan` (/proc/nowhere: " in lines[0]


def test_a_card_whose_link_cannot_be_measured(monkeypatch):
    """Pinning is refused: that is a finding, with its remedy, and no traceback."""

    def refused(device, size):
        raise MemoryLimitError("0.3 GB of host memory could not be pinned (CUDA error 2); raise the limit")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "link_ceiling", refused)
    measured, lines = doctor.measure()
    assert measured == {}
    assert "could not be pinned" in lines[0]


@pytest.mark.parametrize(
    ("uuid", "expected"), [("5f1c-a0", "GPU-5f1c-a0"), ("GPU-5f1c-a0", "GPU-5f1c-a0"), (None, "0")]
)
def test_the_driver_is_asked_for_the_card_that_torch_uses(uuid, expected, monkeypatch, tmp_path):
    """CUDA_VISIBLE_DEVICES and the order of speed mean nothing to nvidia-smi."""
    assert doctor.card_id() == "0" or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid))
    asked = []
    monkeypatch.setattr(doctor.shutil, "which", lambda name: name)
    done = SimpleNamespace(returncode=0, stdout=GOOD)
    monkeypatch.setattr(doctor.subprocess, "run", lambda command, **_: asked.append(command[-1]) or done)
    assert doctor.ask_driver()["driver_version"] == "550.54"
    assert asked == [f"--id={expected}"]


def test_a_containers_limit_is_told(monkeypatch):
    machine = SimpleNamespace(available=90 * 10**9, total=100 * 10**9)
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: machine)
    monkeypatch.setattr(doctor, "free_on_host", lambda: 9 * 10**9)
    found = doctor.check_host()[0]
    assert found.state == "slow"
    assert "container" in found.remedy
    assert "9.0 of 100.0 GB" in found.found
