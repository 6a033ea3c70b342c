"""What ``plan`` imports: of a model of the table, torch and nothing else that takes long. Modules, not seconds."""

import json
import os
import subprocess
import sys

import pytest

from tests.byte_tokenizer import save_tiny_llama

CHILD = """
import json, sys
from offload_triforce.cli import app
try:
    app(sys.argv[1:])
except SystemExit as ended:
    assert not ended.code, ended.code
print(json.dumps(sorted(sys.modules)))
"""
# Each takes a tenth of a second or more.
NEVER = {
    "matplotlib",
    "bitsandbytes",
    "triton",
    "numba",
    "datasets",
    "offload_triforce.bench",
    "offload_triforce.engine",
}
HEAVY = {
    "transformers",
    "scipy",
    "sympy",
    "gguf",
    "tokenizers",
    "accelerate",
    "torch._dynamo",
    "torch.distributed.tensor",
}


def imported(*args):
    """Names of all modules that a command has imported, in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", CHILD, *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def of(modules, names):
    return {name for name in names if any(module == name or module.startswith(f"{name}.") for module in modules)}


@pytest.mark.parametrize("args", [["--json"], ["--quantize", "nf4", "--draft", "qwen3-0.6b"]])
def test_a_model_of_the_table_is_planned_without_transformers(args):
    modules = imported("plan", "--model", "qwen3-8b", "--gpu", "RTX 4090", "--ram", "64GB", *args)
    assert "torch" in modules
    assert not of(modules, NEVER | HEAVY)


def test_a_folder_is_planned_without_what_only_running_needs(tmp_path):
    folder = str(save_tiny_llama(tmp_path))
    modules = imported("plan", "--model", folder, "--vram", "4GB", "--context", "2K", "--json")
    assert "transformers.models.llama.modeling_llama" in modules
    assert not of(modules, {"matplotlib", "bitsandbytes", "offload_triforce.bench", "offload_triforce.engine"})


@pytest.mark.parametrize("args", [["models"], ["models", "--json"]])
def test_the_table_of_names_is_listed_without_torch(args):
    assert not of(imported(*args), NEVER | HEAVY | {"torch"})


@pytest.mark.parametrize("args", [["--help"], ["plan", "--help"], ["generate", "--help"]])
def test_help_does_without_torch(args):
    assert not of(imported(*args), NEVER | HEAVY | {"torch"})
