"""Every study can be imported, so that none of them rots; those that take options say which."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
STUDIES = sorted(path.stem for path in FOLDER.glob("*.py"))
COMMANDS = [name for name in STUDIES if "__main__" in (FOLDER / f"{name}.py").read_text()]


@pytest.mark.parametrize("name", STUDIES)
def test_it_can_be_imported(name):
    importlib.import_module(f"benchmarks.{name}")


@pytest.mark.slow
def test_commands_say_what_they_take():
    """Each in a process of its own, as people run them."""
    running = {
        name: subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.{name}", "--help"], cwd=FOLDER.parent, stdout=subprocess.PIPE, text=True
        )
        for name in COMMANDS
        if name != "family_audit"  # a worker, which reads its work from standard input
    }
    for name, process in running.items():
        said = process.communicate(timeout=240)[0]
        assert process.returncode == 0, name
        assert "usage" in said.lower(), name
