"""What the command line says about a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from offload_triforce.answer import Generation
from offload_triforce.model.prefill import Progress as ProgressCallback
from offload_triforce.stats import DecodeStats


def as_json(result: Generation) -> str:
    """One JSON object with the answer and all statistics."""
    return json.dumps(
        {
            "text": result.text,
            "token_ids": result.token_ids,
            "prompt_ids": result.prompt_ids,
            **result.stats.as_dict(),
        }
    )


def summary(stats: DecodeStats) -> list[str]:
    """The short report, line by line."""
    levels = [("draft", stats.draft.rate), ("retrieval", stats.retrieval.rate)]
    accepted = ", ".join(f"{name} {percent(rate)}" for name, rate in levels)
    saved = stats.full_kv_bytes / stats.link_bytes_per_token if stats.link_bytes else 0.0
    lines = [
        f"prompt {stats.prompt_tokens:,} tokens, answer {stats.new_tokens:,} tokens in {stats.passes:,} passes: "
        f"{stats.tokens_per_pass:.2f} tokens per pass",
        f"first token after {stats.ttft_s:.1f} s (prefill {stats.prefill_s:.1f} s), then "
        f"{stats.ms_per_token:.0f} ms/token",
        f"accepted guesses: {accepted}; guessing took {stats.draft_s:.1f} s, of which passes hid "
        f"{percent(stats.hidden_share)}",
        f"link: {stats.link_bytes_per_token / 1e6:.1f} MB/token; the full KV cache has "
        f"{stats.full_kv_bytes / 1e6:.1f} MB" + (f", {saved:.1f}x as much" if saved else ""),
    ]
    return [*lines, "interrupted: this is what there was until then"] if stats.interrupted else lines


def percent(rate: float | None) -> str:
    """A share for people; a dash where there was nothing to share."""
    return "-" if rate is None else f"{rate:.0%}"


def comparison(runs: dict[str, DecodeStats]) -> Table:
    """Several runs of the same work, side by side."""
    table = Table(title_justify="left")
    table.add_column("")
    for name in runs:
        table.add_column(name, justify="right")
    rows = {
        "new tokens": lambda s: f"{s.new_tokens}",
        "passes over the full cache": lambda s: f"{s.passes}",
        "tokens per pass": lambda s: f"{s.tokens_per_pass:.2f}",
        "accepted from draft / retrieval": lambda s: f"{percent(s.draft.rate)} / {percent(s.retrieval.rate)}",
        "guesses per pass": lambda s: f"{s.nodes / s.passes:.1f}" if s.passes else "-",
        "guessing, s (hidden by passes)": lambda s: f"{s.draft_s:.1f} ({percent(s.hidden_share)})",
        "link MB per token": lambda s: f"{s.link_bytes_per_token / 1e6:.1f}",
        "full KV cache, MB": lambda s: f"{s.full_kv_bytes / 1e6:.1f}",
        "time to first token, s": lambda s: f"{s.ttft_s:.1f}",
        "ms per token": lambda s: f"{s.ms_per_token:.0f}",
    }
    for name, value in rows.items():
        table.add_row(name, *[value(stats) for stats in runs.values()])
    return table


@contextmanager
def bars(console: Console) -> Iterator[tuple[ProgressCallback, ProgressCallback]]:
    """Progress bars for the prefill and for pinning host memory; they vanish before the first token."""
    if not console.is_interactive:  # a file or a pipe has no use for it
        yield (lambda done, total: None), (lambda done, total: None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        prefill = bar.add_task("reading the prompt", total=None)
        memory = bar.add_task("pinning host memory", total=None, visible=False)

        def read(done: int, total: int) -> None:
            bar.update(prefill, completed=done, total=total)
            if done == total:
                bar.stop()

        def pinned(done: int, total: int) -> None:
            bar.update(memory, completed=done, total=total, visible=done < total)

        yield read, pinned
