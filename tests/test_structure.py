"""The shape of the source tree: imports point downward only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the bottom up. A module may import from its own rank and from ranks below.
RANKS = [
    {"_version", "errors", "machine", "config", "stats", "host_memory"},
    {"kernels"},
    {"scheduler"},
    {"cache"},
    {"model"},
    {"speculation"},
    {"detokenize", "chat", "ending", "options", "memory", "request", "checks", "drafts"},
    {"answer", "turn"},
    {"planner"},
    {"runtime"},
    {"async_stream", "decoding"},
    {"engine"},
    {"hf", "prompt"},
    {"report", "demo"},
    {"bench"},
    {"doctor"},
    {"cli", "__main__"},
]


def rank(module: str) -> int:
    part = module.split(".")[1]
    return next(i for i, names in enumerate(RANKS) if part in names)


def sources():
    for folder in ("offload_triforce", "kernels", "scheduler"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts if folder == "offload_triforce" else ("offload_triforce", *parts)), path


MODULES = [(name, path) for name, path in sources() if name != "offload_triforce.__init__"]


@pytest.mark.parametrize(("name", "path"), MODULES, ids=[name for name, _ in MODULES])
def test_imports_point_downward(name, path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module != "offload_triforce" else [f"offload_triforce.{node.names[0].name}"]
        for imported in names:
            if imported and imported.startswith("offload_triforce."):
                assert rank(imported) <= rank(name), f"{name} imports {imported}"
