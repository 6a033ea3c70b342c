"""Which work may be captured, and the state that a capture leaves behind."""

from __future__ import annotations

import pytest
import torch

from offload_triforce.model.capture import CudaCapture, FixedWork, NotFixedError, find_capture

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


@pytest.mark.gpu
def test_cuda_goes_on_after_a_capture_that_fails():
    """In the middle of it: the stream is the old one, and memory can be had."""
    stream = torch.cuda.current_stream()
    numbers, asked = torch.arange(6, device="cuda"), []

    def step():
        asked.append(None)
        return numbers.sum() if len(asked) < 2 else torch.tensor(int(numbers.sum()))

    with pytest.raises(RuntimeError):
        CudaCapture(torch.device("cuda"))(step)
    assert torch.cuda.current_stream() == stream
    assert int((torch.ones(1000, device="cuda") * 2).sum()) == 2000
