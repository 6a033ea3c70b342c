"""What ``bench throughput`` found, for people: a table and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from offload_triforce.bench.contenders import WAYS
from offload_triforce.bench.figures import new_figure, save

COLOURS = {
    "plain": "tab:orange",
    "triforce": "tab:gray",
    "best": "tab:blue",
    "transformers-offloaded": "tab:red",
    "transformers-cpu": "tab:green",
}


def title(report: dict[str, Any]) -> str:
    """One line that says on what; what is emulated says so."""
    slow, link = report["emulated"], report["link"]
    if slow is not None:
        return (
            f"{report['model']}: {slow['card']} EMULATED in slow motion, everything {slow['factor']:,.1f}x slower "
            f"(link {slow['link_gbps']:.3g} for {slow['card_link_gbps']:g} GB/s); not measured on that card"
        )
    where = report["machine"].get("gpu", {}).get("name", "GPU") if report["device"] == "cuda" else "CPU"
    capped = f", memory capped to {report['vram_cap_bytes'] / 1e9:g} GB" if report["vram_cap_bytes"] else ""
    if link["gbps"] is None:
        return f"{report['model']} on a {where}, no link"
    return f"{report['model']} on a {where}, {link['what']} link of {link['gbps']:.3g} GB/s{capped}"


# What is said of each way: name, key in the rows, format, divisor.
FIGURES = (
    ("ms per token", "ms_per_token", ",.1f", 1),
    ("its bytes over the link, ms", "limit_ms_per_token", ",.1f", 1),
    ("tokens per s", "tokens_per_s", ",.2f", 1),
    ("time to first token, s", "ttft_s", ",.1f", 1),
    ("link while decoding, GB/s", "link_gbps", ".3g", 1),
    ("link MB per token", "link_bytes_per_token", ",.1f", 1e6),
    ("tokens per pass", "tokens_per_pass", ".2f", 1),
    ("peak device memory, GB", "device_peak_bytes", ".2f", 1e9),
    ("peak host memory, GB", "host_peak_bytes", ".2f", 1e9),
    ("emulated: ms per token / factor", "card_ms_per_token", ",.2f", 1),
)


def tables(report: dict[str, Any]) -> list[Table]:
    """One for each context, a column for each way that was run."""
    found = []
    for limit in report["limits"]:
        same = [row for row in report["rows"] if all(row[key] == limit[key] for key in ("context", "task"))]
        rows = [row for row in same if not row["skipped"]]
        if rows:
            found.append(_table(title(report), limit, rows))
    return found


def _table(headline: str, limit: dict[str, Any], rows: list[dict[str, Any]]) -> Table:
    least = "" if limit["ms_per_token"] is None else f"; a plain pass takes at least {limit['ms_per_token']:,.1f} ms"
    prompt = f"{rows[0]['task']}, {rows[0]['prompt_tokens']:,} tokens of prompt{least}"
    table = Table(title=f"{headline}\n{prompt}", title_justify="left")
    table.add_column("")
    for row in rows:
        table.add_column(row["way"], justify="right")
    for name, key, form, scale in FIGURES:
        values = [row.get(key) for row in rows]
        if any(value is not None for value in values):
            table.add_row(name, *("-" if value is None else format(value / scale, form) for value in values))
    same = ("yes" if row["differs_at"] is None else f"up to {row['differs_at']}" for row in rows)
    table.add_row(f"same tokens as {rows[0]['way']}", *same)
    return table


def lines(report: dict[str, Any]) -> list[str]:
    """What belongs below the table: why ways were skipped, and how to read the figures."""
    reasons = {row["way"]: row["skipped"] for row in report["rows"] if row["skipped"]}
    ratios = [
        f"{name}: {ratio['mean']:.2f} on average over {ratio['tasks']} tasks, {ratio['worst']:.2f} at worst"
        for name, ratio in report.get("against_transformers", {}).items()
    ]
    return [*ratios, *(f"{way} was skipped: {reason}" for way, reason in reasons.items()), *report["notes"]]


def draw(report: dict[str, Any], path: Path) -> None:
    """Milliseconds per token against the context, with the limit of the link.

    Raises:
        InputError: matplotlib is not there.
    """
    figure = new_figure(9, 5.5)
    axes = figure.subplots()
    for way, label in WAYS.items():
        rows = [row for row in report["rows"] if row["way"] == way and row.get("ms_per_token") is not None]
        if rows:
            rows.sort(key=lambda row: row["context"])
            places, heights = [row["context"] for row in rows], [row["ms_per_token"] for row in rows]
            axes.plot(places, heights, marker="o", color=COLOURS[way], label=label)
    limits = sorted((limit["context"], limit["ms_per_token"]) for limit in report["limits"] if limit["ms_per_token"])
    if limits:
        label = "limit of a plain pass: bytes of the KV cache / bandwidth"
        axes.plot(*zip(*limits, strict=True), linestyle="--", marker=".", color="black", label=label)
    emulated = " (in slow motion)" if report["emulated"] else ""
    axes.set(xlabel="context, tokens", ylabel=f"ms per token{emulated}", xlim=(0, None), ylim=(0, None))
    axes.set_title(title(report), fontsize=9, wrap=True)
    axes.legend(frameon=False, fontsize=8)
    save(figure, path)
