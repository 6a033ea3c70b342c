"""Each example runs, as its own process, on a tiny model."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.byte_tokenizer import save_tiny_llama

EXAMPLES = Path(__file__).parent.parent / "examples"
ARGUMENTS = {
    "first_tokens.py": (["{model}"], ""),
    "long_document.py": ([str(Path(__file__).parent / "byte_tokenizer.py"), "{model}"], "passes over the full cache"),
    "transformers_model.py": (["{model}"], "same tokens as transformers: True"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_llama(tmp_path_factory.mktemp("tiny")))


def test_every_example_is_listed():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_example(name, model):
    arguments, expected = ARGUMENTS[name]
    command = [sys.executable, str(EXAMPLES / name), *[a.format(model=model) for a in arguments]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    assert done.stdout.strip()
