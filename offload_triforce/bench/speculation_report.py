"""What ``bench speculation`` found, for people: a table and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from offload_triforce.bench.figures import new_figure, save

COLOURS = {"triforce": "tab:gray", "ours": "tab:blue"}


def table(report: dict[str, Any]) -> Table:
    """One row per cell; cells whose answers fell into loops are marked, and left out of the means."""
    mean, models = report.get("mean_ratio"), {cell["model"] for cell in report["cells"]}
    title = "every answer fell into a loop" if mean is None else f"{mean:.2f}x TriForce's on average"
    found = Table(title=f"{', '.join(sorted(models))}, tokens per pass: {title}", title_justify="left")
    for name in ("task", "T", "ours", "theirs", "ratio", "accepted", "MB/token", "drafting"):
        found.add_column(name, justify="left" if name == "task" else "right")
    for cell in report["cells"]:
        ours = cell["ways"]["ours"]
        low, high = ours["spread"]
        accepted = " / ".join("-" if rate is None else f"{rate:.0%}" for rate in ours["acceptance"].values())
        found.add_row(
            (cell["task"] if len(models) == 1 else f"{cell['model']}, {cell['task']}") + "*" * cell["looped"],
            f"{cell['temperature']:g}",
            f"{cell['tokens_per_pass']:.1f}" + (f" ({low:.0f}-{high:.0f})" if high > low else ""),
            f"{cell['tokens_per_pass_triforce']:.1f}",
            f"{cell['ratio']:.2f}",
            accepted,
            f"{ours['link_bytes_per_token'] / 1e6:.1f}",
            f"{ours['draft_share']:.0%}",
            style="dim" if cell["looped"] else None,
        )
    for name, ratio in report.get("mean_ratio_by_way", {}).items():
        if name not in COLOURS:
            found.add_row(name, "", "", "", f"{ratio:.2f}", "", "", "")
    if any(cell["looped"] for cell in report["cells"]):
        found.caption = "* fell into loops, which flatter everybody: not counted"
    return found


def draw(report: dict[str, Any], path: Path) -> None:
    """Tokens per pass, cell by cell, with the least and the most of single answers.

    Raises:
        InputError: matplotlib is not there.
    """
    cells = [cell for cell in report["cells"] if not cell["looped"]] or report["cells"]
    figure = new_figure(max(5.0, 1.1 + 0.7 * len(cells)), 4)
    axes = figure.subplots()
    for shift, name in ((-0.2, "triforce"), (0.2, "ours")):
        ways = [cell["ways"][name] for cell in cells]
        heights = [way["tokens_per_pass"] for way in ways]
        ends = [[h - way["spread"][0] for h, way in zip(heights, ways, strict=True)]]
        ends.append([way["spread"][1] - h for h, way in zip(heights, ways, strict=True)])
        ends = [[max(0.0, end) for end in side] for side in ends]
        label = "TriForce's setting" if name == "triforce" else "offload-triforce"
        places = [place + shift for place in range(len(cells))]
        axes.bar(places, heights, 0.38, color=COLOURS[name], label=label, yerr=ends, error_kw={"linewidth": 0.8})
    labels = [f"{cell['task']}\nT={cell['temperature']:g}" for cell in cells]
    if len({cell["model"] for cell in cells}) > 1:
        labels = [f"{label}\n{cell['model']}" for label, cell in zip(labels, cells, strict=True)]
    axes.set_xticks(range(len(cells)), labels, fontsize=8)
    axes.set_ylabel("tokens per pass over the full cache")
    mean = report.get("mean_ratio")
    axes.set_title("same memory, same texts" + (f": {mean:.2f}x on average" if mean else ""), fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    save(figure, path)
