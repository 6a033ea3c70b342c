"""kill -9 at any moment of saving loses no older session, and leaves no half one that loads."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("count", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_while_saving(tmp_path, count):
    run = [sys.executable, "-m", "tests.runtime.killed_saves", str(tmp_path / "session"), str(count), str(os.getpid())]
    done = subprocess.run(run, capture_output=True, text=True, timeout=500, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    print(report)
    steps, before, after = report["steps"]
    assert steps > 60
    assert before > 8
    assert after > 5  # some died after the new manifest was in place, and the old files were still there
    assert report["first"] > 2
    killed, before, after = report["random"]
    assert before + after == count
    assert killed >= count // 4
