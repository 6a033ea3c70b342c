"""Shared by all tests: threads that fit the number of workers, and the one real model."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides whether to interpret as kernels are defined, so before anything imports them.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


@pytest.fixture(scope="session", autouse=True)
def one_thread_for_children():
    """Programs that tests start: teams of OpenMP that wait, spinning, slow a busy machine. One that says so itself
    still takes more threads. (A fixture, so that it is set where tests run, and workers do not inherit it.)
    """
    with pytest.MonkeyPatch.context() as patch:
        if "OMP_NUM_THREADS" not in os.environ:
            patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def one_thread():
    """Of torch's: where tensors are tiny, or several threads of ours are at work, a second would be in the way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct with its tokenizer: (model, tokenizer). Brought once per machine."""
    from offload_triforce.model.fetch import fetch_model
    from offload_triforce.model.loader import load_model

    return load_model(fetch_model("smollm2", hub=False), torch.float32, torch.device("cpu"))


def pytest_collection_modifyitems(items):
    """The longest first: at the end, one worker would be left with the real model while the others stand idle."""
    items.sort(key=lambda item: "smollm2" not in getattr(item, "fixturenames", ()))
