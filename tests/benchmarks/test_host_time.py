"""The host's time per tile: the real launcher reaches the driver that does nothing, as often as it should."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.without_interpreter import run_compiling

pytest.importorskip("triton")


@pytest.mark.skipif(shutil.which("cc") is None, reason="the driver that does nothing is compiled with cc")
def test_every_launch_of_a_tile_gets_to_the_driver(tmp_path):
    run = run_compiling("benchmarks.host_time", "--repeat", "2", "--json", str(tmp_path / "out.json"), timeout=240)
    assert run.returncode == 0, run.stderr[-2000:]
    found = {(row["coded"], row["refresh"]): row for row in json.loads((tmp_path / "out.json").read_text())["tiles"]}
    launches = {kind: row["launches_per_tile"] for kind, row in found.items()}
    assert launches == {(True, True): 4, (True, False): 2, (False, True): 3, (False, False): 1}
    assert run.stdout.count(" us, ") == 4
