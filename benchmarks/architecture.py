"""The picture of docs/architecture.md: packages as boxes, imports as lines, drawn from the sources as they are.

    python -m benchmarks.architecture --out docs/architecture.png

A package stands above everything that it imports. Lines that another path implies are left out.
"""

from __future__ import annotations

import argparse
import ast
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "offload_triforce"
# Small modules that everything imports: a line to them says nothing.
EVERYWHERE = {"errors", "config", "_version", "__init__", "__main__"}
COLOURS = {"people": "#dbe9f6", "one model": "#e3f1df", "algorithm and plan": "#fdf0d5", "hot path": "#f8dedd"}
HOMES = {"kernels": "hot path", "scheduler": "hot path", "cache": "hot path", "runtime": "one model"}
HOMES |= {"engine": "one model", "graphs": "one model", "model": "one model", "generation": "one model"}
HOMES |= {"speculation": "algorithm and plan", "planner": "algorithm and plan", "machine": "algorithm and plan"}


def sources() -> dict[str, list[Path]]:
    """Files by package; a module at the root is a package of its own."""
    found: dict[str, list[Path]] = defaultdict(list)
    for folder in (PACKAGE, "kernels", "scheduler"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT / folder)
            name = folder if folder != PACKAGE else inside.parts[0].removesuffix(".py")
            found[name].append(path)
    return {name: paths for name, paths in found.items() if name not in EVERYWHERE}


def imports(packages: dict[str, list[Path]]) -> dict[str, set[str]]:
    """Which packages each one imports."""
    found: dict[str, set[str]] = {name: set() for name in packages}
    for name, paths in packages.items():
        for path in paths:
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(PACKAGE):
                    continue
                parts = node.module.split(".")
                targets = {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
                found[name] |= targets & packages.keys() - {name}
    return found


def floors(edges: dict[str, set[str]]) -> dict[str, int]:
    """How many packages at most lie below each one, one on top of the other.

    Raises:
        graphlib.CycleError: some import each other.
    """
    known: dict[str, int] = {}
    for name in TopologicalSorter(edges).static_order():
        known[name] = 1 + max((known[below] for below in edges[name]), default=-1)
    return known


def reduced(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """Without the lines that a longer path implies."""

    def reached(name: str) -> set[str]:
        below = set(edges[name])
        for other in edges[name]:
            below |= reached(other)
        return below

    return {name: below - set().union(*(reached(other) for other in below)) for name, below in edges.items()}


def draw(out: Path) -> None:
    """Draw the packages to a file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import FancyBboxPatch, Patch

    packages = sources()
    edges = imports(packages)
    level = floors(edges)
    rows: dict[int, list[str]] = defaultdict(list)
    for name in sorted(level, key=lambda name: (HOMES.get(name, "people"), name)):
        rows[level[name]].append(name)
    place = {}
    for floor, names in rows.items():
        for column, name in enumerate(names):
            place[name] = (3.2 * (column - (len(names) - 1) / 2), 1.5 * floor)
    figure, axes = pyplot.subplots(figsize=(11, 1.3 * len(rows) + 0.6))
    for name, below in reduced(edges).items():
        for other in below:
            (x, y), (u, v) = place[name], place[other]
            arrow = {"arrowstyle": "-|>", "color": "#777777", "linewidth": 0.9, "shrinkA": 0, "shrinkB": 1}
            axes.annotate("", xy=(u, v + 0.4), xytext=(x, y - 0.4), arrowprops=arrow, zorder=0)
    for name, (x, y) in place.items():
        lines = sum(len(path.read_text().splitlines()) for path in packages[name])
        colour = COLOURS[HOMES.get(name, "people")]
        axes.add_patch(
            FancyBboxPatch(
                (x - 1.3, y - 0.4), 2.6, 0.8, boxstyle="round,pad=0.02", facecolor=colour, edgecolor="#444444", zorder=2
            )
        )
        axes.text(x, y + 0.1, name, ha="center", va="center", fontsize=12, fontweight="bold", zorder=3)
        files = len(packages[name])
        text = f"{files} file{'s' if files > 1 else ''}, {lines:,} lines"
        axes.text(x, y - 0.2, text, ha="center", va="center", fontsize=8, color="#444444", zorder=3)
    widest = max(len(names) for names in rows.values())
    axes.set_xlim(-1.7 * widest, 1.7 * widest)
    axes.set_ylim(-0.8, 1.5 * max(rows) + 0.8)
    axes.axis("off")
    axes.legend(
        handles=[Patch(facecolor=c, edgecolor="#444444", label=n) for n, c in COLOURS.items()], loc="upper left"
    )
    figure.savefig(out, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "architecture.png")
    draw(parser.parse_args().out)
