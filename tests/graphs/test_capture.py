"""Which work may be captured, and the state that a capture leaves behind."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest
import torch

from offload_triforce.graphs.capture import FixedWork, NotFixedError, find_capture

CPU = torch.device("cpu")
NUMBERS = torch.arange(6)
ASKING = {
    "item": lambda: int(NUMBERS.max()),
    "if": lambda: 1 if (NUMBERS > 3).any() else 0,
    "equal": lambda: torch.equal(NUMBERS, NUMBERS),
    "nonzero": lambda: NUMBERS.nonzero(),
    "mask": lambda: NUMBERS[NUMBERS > 3],
    "mask to write": lambda: NUMBERS.clone().index_put_((NUMBERS > 3,), torch.tensor(0)),
    "unique": lambda: NUMBERS.unique(),
    "another device": lambda: NUMBERS.to("meta"),
    "too large": lambda: torch.zeros(300),
    "too large a copy": lambda: NUMBERS.double().repeat(30),
}
FIXED = {
    "index": lambda: NUMBERS[NUMBERS % 3],
    "write": lambda: NUMBERS.clone().index_put_((NUMBERS % 3,), NUMBERS),
    "dtype": lambda: NUMBERS.float().to(torch.bfloat16),
    "masked fill": lambda: NUMBERS.masked_fill(NUMBERS > 3, 0),
    "large view": lambda: NUMBERS.expand(1000, 6),
    "copy": lambda: NUMBERS.clone().copy_(NUMBERS.int()),
}


@pytest.mark.parametrize("work", ASKING.values(), ids=ASKING)
def test_work_that_is_not_fixed_is_refused(work):
    work()
    with pytest.raises(NotFixedError), FixedWork(CPU, most_bytes=1000):
        work()


@pytest.mark.parametrize("work", FIXED.values(), ids=FIXED)
def test_work_that_is_fixed(work):
    with FixedWork(CPU, most_bytes=1000):
        work()


def test_on_the_cpu_there_is_nothing_to_gain():
    assert find_capture(CPU) is None


class Watch:
    """torch's watch for operations that wait, where there is no CUDA."""

    def __init__(self, monkeypatch):
        self.mode, self.seen = 1, []
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.mode)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self.set)

    def set(self, mode):
        self.mode = mode
        self.seen.append(mode)


@pytest.mark.parametrize("fails", [False, True])
def test_on_cuda_torch_watches_inside_of_operations(fails, monkeypatch):
    """Of other libraries' operations, the dispatcher shows the outside alone. Afterwards, the watch is as it was."""
    watch = Watch(monkeypatch)
    with contextlib.suppress(ZeroDivisionError), FixedWork(torch.device("cuda")):
        assert watch.mode == "error"
        if fails:
            raise ZeroDivisionError
    assert watch.seen == ["error", 1]


AFTER_A_FAILED_CAPTURE = """
import torch
from offload_triforce.graphs.capture import CudaCapture, FixedWork

@torch.library.custom_op("tests::asks", mutates_args=())
def asks(numbers: torch.Tensor) -> torch.Tensor:
    return torch.zeros(int(numbers.sum()), device=numbers.device)

numbers, asked = torch.arange(6, device="cuda"), []
try:
    with FixedWork(torch.device("cuda")):
        asks(numbers)
except RuntimeError as error:
    assert "synchroniz" in str(error), error
else:
    raise AssertionError("an operation that waits inside was not noticed")

def step():
    asked.append(None)
    return numbers.sum() if len(asked) < 2 else torch.tensor(int(numbers.sum()))

stream = torch.cuda.current_stream()
try:
    CudaCapture(torch.device("cuda"))(step)
except RuntimeError:
    pass
else:
    raise AssertionError("CUDA captured a step that asks the device")
assert torch.cuda.current_stream() == stream
assert int((torch.ones(1000, device="cuda") * 2).sum()) == 2000
# Memory that another stream has used comes back once that is through.
side, blocks = torch.cuda.Stream(), set()
for _ in range(8):
    block = torch.ones(64 << 20, dtype=torch.uint8, device="cuda")
    blocks.add(block.data_ptr())
    block.record_stream(side)
    del block
    torch.cuda.synchronize()
assert len(blocks) < 8, "what other streams have used is never freed"
torch.cuda.empty_cache()
print("fine")
"""


@pytest.mark.gpu
def test_cuda_goes_on_after_a_capture_that_fails():
    """In the middle of it: the stream is the old one, and memory can be had. In a process of its own, in case not."""
    done = subprocess.run([sys.executable, "-c", AFTER_A_FAILED_CAPTURE], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "fine", done.stderr
