"""The program for the first minutes on a GPU, rehearsed: what is broken shows here, and not there."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import gpu_kernels, gpu_link
from benchmarks.gpu import PARTS, main
from benchmarks.gpu_table import table

pytestmark = pytest.mark.xdist_group("rehearsal")  # by one worker: one run of the program is for all tests here
ROOT = Path(__file__).parents[2]
KERNELS = {"attention", "chunk scores", "selection, none enters", "selection, all enter", "packed attention"}


def rehearse(*options):
    """Its table, line by line, and its report."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    return lines, json.loads(last)


@pytest.fixture(scope="module")
def whole():
    return rehearse()


def test_every_part_runs_and_has_lines_in_the_table(whole):
    lines, report = whole
    assert set(report["parts"]) == set(PARTS)
    assert not any({"error", "skipped"} & found.keys() for part in report["parts"].values() for found in part.values())
    assert lines[0].split() == ["part", "where", "what", "figure"]
    assert {line.split()[0] for line in lines[2:]} == set(PARTS)
    assert "\n".join(lines) == table(report)


def test_each_kernel_at_each_size_as_a_share_of_the_link(whole):
    (found,) = whole[1]["parts"]["kernels"].values()
    assert {(row["kernel"], row["nodes"]) for row in found["rows"]} == {
        (name, nodes) for name in KERNELS for nodes in gpu_kernels.NODES
    }
    assert gpu_kernels.NODES == (1, 13, 49, 193, 512)
    for row in found["rows"]:
        share = row["us"] * 1e-6 * found["link_gbps"] * 1e9 / found["tile_bytes"]
        assert row["share_of_link"] == pytest.approx(share)
        assert row["share_by_gbps"]["25"] == pytest.approx(share * 25 / found["link_gbps"])
    lines = [line for line in whole[0] if line.startswith("kernels")]
    assert len(lines) == len(found["rows"]) + 1


def test_passes_at_the_settings_ring_and_share_and_what_limits_them(whole):
    (found,) = whole[1]["parts"]["passes"].values()
    assert [row["queries"] for row in found["rows"]] == [1, 13, 17]
    for row in found["rows"]:
        assert (row["ring"], row["resident"]) == (4, 0.25)
        assert row["moved_over_needed"] == 1, "each streamed byte crosses the link once"
        assert row["limit"] in ("link", "host", "computation")
        assert 0 < row["host_s"] <= row["pass_s"]
        assert row["computation_s"] <= row["pass_s"]
        assert any(f"{row['queries']} queries" in line and f"limited by {row['limit']}" in line for line in whole[0])


def test_steps_are_made_beside_a_pass(whole):
    (found,) = whole[1]["parts"]["overlap"].values()
    assert found["steps"] > 0
    assert 0 < found["link_used_with_drafting"] <= 1.01


def test_whole_steps_count_sampling_and_python(whole):
    (found,) = whole[1]["parts"]["step"].values()
    assert len(found["first_ms"]) == 4
    for row in found["whole"].values():
        assert row["steps"] > row["passes"] > 0
        assert row["tokens_per_step"] > 1


def test_the_link_in_all_ways(whole):
    (found,) = whole[1]["parts"]["link"].values()
    assert set(found["small_copies_us"]) == {
        f"{way}_{when}" for way in ("h2d", "d2h") for when in ("idle", "streaming")
    }
    assert found["pin_gbps"] is None, "nothing is pinned on a CPU"
    assert min(found["h2d_gbps"], found["d2h_gbps"], found["both_at_once_gbps"]) > 0


def test_single_parts_and_no_time_left(monkeypatch, capsys, one_thread):
    arguments = ["--rehearse", "--part", "machine", "--part", "kernels", "--minutes", "0"]
    monkeypatch.setattr("sys.argv", ["gpu", *arguments])
    main()
    *lines, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    assert set(report["parts"]) == {"machine", "kernels"}
    (machine,), (kernels,) = (report["parts"][name].values() for name in ("machine", "kernels"))
    assert "0 minutes are over; --part kernels runs it alone" in kernels["skipped"]
    assert any(line.startswith("kernels") and "0 minutes are over" in line for line in lines)
    assert "skipped" in machine


def test_what_nvidia_smi_does_not_know_is_said(monkeypatch):
    def answer(command, **_):
        known = "driver_version" in command[1]
        return SimpleNamespace(returncode=0 if known else 6, stdout="570.86.10\n" if known else "Field is not valid")

    monkeypatch.setattr(gpu_link.shutil, "which", lambda name: name)
    monkeypatch.setattr(gpu_link.subprocess, "run", answer)
    said = gpu_link.card_says()
    assert said["driver_version"] == "570.86.10"
    assert said["clocks.max.sm"] == "not known to this driver"
    assert set(gpu_link.FIELDS) <= set(said)


def test_parts_that_fail_or_are_skipped_are_in_the_table_too():
    parts = {"memory": {"here": {"skipped": "too small"}}, "link": {"here": {"error": "OSError: no"}}}
    lines = table({"parts": parts}).splitlines()
    assert "too small" in lines[2]
    assert "error" in lines[3]
    assert "OSError: no" in lines[3]
