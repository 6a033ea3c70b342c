"""The report of ``benchmarks.gpu`` as a table for people: one line per figure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Row = tuple[str, str, str, str]


def table(report: dict[str, Any]) -> str:
    """Part, where, what, figure; in columns."""
    rows = [("part", "where", "what", "figure"), *_rows(report)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = []
    for *cells, figure in rows:
        lines.append("  ".join([*(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), figure]))
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _rows(report: dict[str, Any]) -> Iterator[Row]:
    for name, found in report["parts"].items():
        for where, result in found.items():
            if "skipped" in result or "error" in result:
                kind = "skipped" if "skipped" in result else "error"
                yield name, where, kind, str(result[kind])
            else:
                for what, figure in _FIGURES[name](result):
                    yield name, where, what, figure


def _machine(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "device", f"{found['device']}, {found['memory_gbps']:.0f} GB/s within its memory"
    yield from found["card"].items()


def _link(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "to the device", f"{found['h2d_gbps']:.2f} GB/s"
    yield "to the host", f"{found['d2h_gbps']:.2f} GB/s"
    yield "both at once", f"{found['both_at_once_gbps']:.2f} GB/s together"
    yield "pinning", "no card" if found["pin_gbps"] is None else f"{found['pin_gbps']:.2f} GB/s"
    for direction in ("h2d", "d2h"):
        times = found["small_copies_us"]
        idle, busy = times[f"{direction}_idle"], times[f"{direction}_streaming"]
        yield f"4 KB {direction}", f"{idle:.0f} us on an idle link, {busy:.0f} us while tiles stream in"


def _kernels(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for row in found["rows"]:
        share = f"{row['share_of_link']:.1%} of a tile's time on the link"
        yield f"{row['kernel']}, {row['nodes']} nodes", f"{row['us']:.1f} us, {share}"
    compiled = sum(row["first_call_s"] for row in found["rows"])
    yield "first calls, which compile", f"{compiled:.1f} s in all"


def _passes(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for row in found["rows"]:
        over = f"{row['pass_over_link']:.3f} of its bytes on the link" if row["pass_bytes"] else "nothing streamed"
        times = ", ".join(f"{name} {1e3 * row[f'{name}_s']:.1f}" for name in ("link", "host", "computation"))
        yield (
            f"{row['queries']} queries",
            f"{1e3 * row['pass_s']:.1f} ms, {over} ({times}): limited by {row['limit']}; ring {row['ring']}, "
            f"{row['resident']:.1%} resident",
        )


def _overlap(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "link used, pass alone", f"{found['link_used_alone']:.1%}"
    yield "link used, drafting beside it", f"{found['link_used_with_drafting']:.1%}, {found['steps']} steps"


def _step(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    graph = f"{found['replayed_ms']:.2f} ms as a graph, " if found["graphs"] else ""
    yield f"forward of {found['tokens']} tokens", f"{graph}{found['launched_ms']:.2f} ms launched one by one"
    yield "capturing its graph", f"{found['capture_s']:.2f} s" if found["graphs"] else "no graphs here"
    for name in ("greedy", "drawn"):
        row = found["whole"][name]
        yield f"whole step, {name}", f"{row['step_ms']:.2f} ms for {row['tokens_per_step']:.1f} tokens"


def _memory(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    peak, planned = found["peak_bytes"], found["planned_bytes"]
    yield "peak against the plan", f"{peak / 1e9:.3f} of {planned / 1e9:.3f} GB planned ({peak / planned:.1%})"


def _prefill(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield f"{found['tokens']:,} tokens", f"{found['tokens_per_s']:,.0f} tokens/s, {found['speedup']:.2f} x transformers"


_FIGURES = {
    "machine": _machine,
    "link": _link,
    "kernels": _kernels,
    "passes": _passes,
    "overlap": _overlap,
    "step": _step,
    "memory": _memory,
    "prefill": _prefill,
}
