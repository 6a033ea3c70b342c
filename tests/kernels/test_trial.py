"""The kernel that tells whether Triton's kernels run here: by the interpreter, and on drivers that are not here."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton")

from offload_triforce.kernels import trial
from tests.without_interpreter import run_compiling


@pytest.fixture(scope="module")
def report():
    run = run_compiling("tests.kernels.trial_drivers", timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def test_the_kernel_doubles(device):
    numbers = torch.randn(trial.NUMBERS, device=device)
    assert torch.equal(trial.double(numbers), 2 * numbers)


def test_a_driver_that_runs_it(report):
    assert report["good"] == {"state": "ok", "found": "there, and a kernel ran", "remedy": None, "launches": 1}


@pytest.mark.parametrize(("cc", "variable"), [(89, "TRITON_PTXAS_PATH"), (120, "TRITON_PTXAS_BLACKWELL_PATH")])
def test_a_driver_that_is_too_old(report, cc, variable):
    """What helps is named: the variable of the very ptxas that Triton runs for this card, and its version."""
    found = report[f"old {cc}"]
    assert (found["state"], found["launches"]) == ("missing", 0)
    assert found["found"] == "its kernels do not run: Triton Error [CUDA]: device kernel image is invalid"
    older, newer = report["ptxas"]
    version = older if cc == 89 else newer
    for words in ("newer NVIDIA driver", f"set {variable} to", f"of CUDA {version})", "older triton", "=torch"):
        assert words in found["remedy"], words


def test_a_kernel_that_writes_nothing(report):
    found = report["wrong numbers"]
    assert (found["state"], found["launches"]) == ("missing", 1)
    assert "wrote wrong numbers" in found["found"]


def test_other_obstacles(report):
    assert "gcc python3-dev" in report["no compiler"]["remedy"]
    assert "something new" in report["unheard of"]["found"]
    assert all("OFFLOAD_TRIFORCE_KERNELS=torch" in report[name]["remedy"] for name in ("no compiler", "unheard of"))


def test_without_a_card_or_without_triton_nothing_is_launched(report):
    assert report["no triton"] is None
    assert report["no card"]["state"] == "ok"
    assert "eager twins" in report["no card"]["found"]
    assert report["no card"]["launches"] == 0
