"""The most memory in use while something ran."""

import subprocess
import sys

# In a process of its own: in one that has run for long, a large tensor may land in memory that it holds already. The
# tensor stays until the watching thread has seen it, however busy the machine is.
HELD = """
import time, torch
from offload_triforce.bench.peak import PeakMemory

SIZE = 256 << 20
with PeakMemory(torch.device("cpu")) as peak:
    before, end = peak.host, time.monotonic() + 30
    held = torch.ones(SIZE, dtype=torch.uint8)
    while peak.host < before + SIZE * 3 // 4 and time.monotonic() < end:
        time.sleep(0.001)
    del held
assert peak.host >= before + SIZE * 3 // 4, (peak.host, before)
assert peak.device is None
after = peak._process.memory_info().rss
assert after < peak.host, "the tensor is gone, and counts all the same"
with PeakMemory(torch.device("cpu")) as second:
    pass
assert second.host < peak.host, "another watch knows nothing of the first"
"""


def test_a_tensor_that_is_held_for_a_while_is_seen():
    """By the watching thread, which nobody asks to look; and it is remembered when the tensor is gone."""
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
