"""The shape of the source tree: few modules at the root, short files, and imports that point downward only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the bottom up. A part may import from itself and from what stands before it, on its line too: there is no cycle.
ORDER = """
errors _version
kernels
scheduler
machine config cache
speculation model graphs
planner generation runtime
engine integrations bench server
cli __main__
"""
RANKS = ORDER.split()
FACE = {"__init__", "__main__", "_version", "config", "engine", "errors"}
MOST_LINES = 330
PURE = {"errors", "scheduler", "speculation"}  # what the algorithm may import


def sources():
    for folder in ("offload_triforce", "kernels", "scheduler"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts if folder == "offload_triforce" else ("offload_triforce", *parts)), path


MODULES = dict(sources())


def part_of(module):
    """The package, or the module at the root, that a module of ours belongs to."""
    return module.split(".")[1]


def imported_by(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            whole = node.module == "offload_triforce"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if whole else [node.module or ""]
        yield from (name for name in names if name.startswith("offload_triforce."))


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"offload_triforce.__init__"}))
def test_imports_point_downward(name):
    for imported in imported_by(MODULES[name]):
        assert RANKS.index(part_of(imported)) <= RANKS.index(part_of(name)), f"{name} imports {imported}"


def test_the_algorithm_imports_no_cache_model_or_kernel():
    """Of the scheduler, only what a pass says about its time, and how to move a tensor."""
    for name, path in MODULES.items():
        if part_of(name) == "speculation":
            assert {part_of(imported) for imported in imported_by(path)} <= PURE, name


def test_the_root_is_the_face():
    assert {path.stem for path in (ROOT / "offload_triforce").glob("*.py")} == FACE
    assert {part_of(name) for name in MODULES} - {"__init__"} == set(RANKS)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_files_hold_one_idea(name):
    lines = MODULES[name].read_text().count("\n")
    assert lines <= MOST_LINES, f"{lines} lines, {lines - MOST_LINES} too many"
