"""Programs in which Triton's kernels are compiled: in the process of the tests they may belong to the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_compiling(module, *arguments, timeout=3000, **environment):
    """Run ``python -m module`` in a process of its own, in which Triton compiles."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    return subprocess.run(command, env=kept | environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
