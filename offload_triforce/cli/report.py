"""What the command line says about a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from offload_triforce.cli.loading import Loading
from offload_triforce.engine import TriForce
from offload_triforce.generation.answer import Generation
from offload_triforce.model.prefill import Progress as ProgressCallback
from offload_triforce.speculation.stats import DecodeStats

_REASONS = {
    "stop": "stop (the answer ended)",
    "stop_string": "stop_string (one of --stop)",
    "length": "length (the limit of new tokens)",
}


def as_json(result: Generation) -> str:
    """One JSON object with the answer and all statistics."""
    return json.dumps(as_dict(result))


def as_dict(result: Generation) -> dict[str, Any]:
    """See ``as_json``."""
    return {
        "text": result.text,
        "token_ids": result.token_ids,
        "prompt_ids": result.prompt_ids,
        **result.stats.as_dict(),
    }


def opening(engine: TriForce) -> str:
    """Before the answer, in one line: the device, the dtype, and where the KV cache lies. For a running engine."""
    layout, runtime = engine.layout, engine.runtime
    cuda = layout.device.type == "cuda"
    device = torch.cuda.get_device_name(layout.device) if cuda else "CPU"
    line = f"{device}, {str(layout.dtype).removeprefix('torch.')}; KV cache for {runtime.context:,} tokens"
    plan, gbps = runtime.plan, runtime.settings.link_gbps
    if plan is None:
        return f"{line} on the device: every layer has a sliding window"
    line += f" ({_size(plan.layers * plan.tiles * plan.tile_bytes)}) in host memory"
    if plan.coded_bytes:
        line += f", coded {plan.wire_ratio:.2f}x smaller"
    if not cuda and gbps is None:
        return line
    behind = "" if cuda else f" behind an emulated link of {gbps:g} GB/s"
    return f"{line}{behind}, {plan.resident:.0%} of it resident on the device"


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} KB"


def closing(result: Generation) -> str:
    """After the answer, in one line: why it stopped, its length and speed."""
    reason, stats = result.finish_reason or "unfinished", result.stats
    return f"{_REASONS.get(reason, reason)}: {stats.new_tokens:,} tokens, {stats.ms_per_token:.0f} ms/token"


def summary(stats: DecodeStats, link: bool) -> list[str]:
    """The whole report, line by line. ``link``: there is one, be it emulated."""
    drafters = ", ".join(f"{name} {percent(one.rate)} of {one.judged:,}" for name, one in stats.by_drafter.items())
    accepted = f"draft {percent(stats.draft.rate)}{drafters and f' ({drafters})'}, "
    accepted += f"retrieval {percent(stats.retrieval.rate)}"
    saved = stats.full_kv_bytes / stats.link_bytes_per_token if stats.link_bytes else 0.0
    held = f" ({stats.reused_tokens:,} of them held before)" if stats.reused_tokens else ""
    held += f" (a prefill that was stopped went on after {stats.resumed_tokens:,} more)" if stats.resumed_tokens else ""
    lines = [
        f"prompt {stats.prompt_tokens:,} tokens{held}, answer {stats.new_tokens:,} tokens in {stats.passes:,} passes: "
        f"{stats.tokens_per_pass:.2f} tokens per pass",
        f"first token after {stats.ttft_s:.1f} s (prefill {stats.prefill_s:.1f} s), then "
        f"{stats.ms_per_token:.0f} ms/token",
        f"accepted draft tokens: {accepted}; drafting took {stats.draft_s:.1f} s, {percent(stats.hidden_share)} of it "
        "overlapped with passes",
    ]
    if link:
        lines.append(
            f"link: {stats.link_bytes_per_token / 1e6:.1f} MB/token{_before_coding(stats)}; the full KV cache has "
            f"{stats.full_kv_bytes / 1e6:.1f} MB" + (f", {saved:.1f}x as much" if saved else "")
        )
    return lines


def _before_coding(stats: DecodeStats) -> str:
    """What would have crossed the link raw, where it was coded."""
    if stats.raw_link_bytes == stats.link_bytes:
        return ""
    return f" ({stats.raw_link_bytes / stats.new_tokens / 1e6:.1f} MB before coding, {stats.wire_ratio:.2f}x)"


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
        "draft tokens per pass": lambda s: f"{s.draft_tokens / s.passes:.1f}" if s.passes else "-",
        "drafting, s (overlapped)": lambda s: f"{s.draft_s:.1f} ({percent(s.hidden_share)})",
        "link MB per token": lambda s: f"{s.link_bytes_per_token / 1e6:.1f}",
        "full KV cache, MB": lambda s: f"{s.full_kv_bytes / 1e6:.1f}",
        "time to first token, s": lambda s: f"{s.ttft_s:.1f}",
        "ms per token": lambda s: f"{s.ms_per_token:.0f}",
    }
    for name, value in rows.items():
        table.add_row(name, *[value(stats) for stats in runs.values()])
    return table


@contextmanager
def bars(console: Console, loading: Loading | None = None) -> Iterator[tuple[ProgressCallback, ProgressCallback]]:
    """Progress bars for the prefill and for pinning host memory; they vanish before the first token.

    ``loading``: of a session that may be read first.
    """
    if not console.is_interactive:  # a file or a pipe has no use for it
        yield (lambda done, total: None), (lambda done, total: None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        prefill = bar.add_task("reading the prompt", total=None)
        memory = bar.add_task("pinning host memory", total=None, visible=False)
        session = bar.add_task("loading the session", total=None, visible=False)

        def read(done: int, total: int) -> None:
            bar.update(prefill, completed=done, total=total)
            if done == total:
                bar.stop()

        def pinned(done: int, total: int) -> None:
            bar.update(memory, completed=done, total=total, visible=done < total)

        loading = loading or Loading()
        loading.shown = lambda done, total: bar.update(session, completed=done, total=total, visible=done < total)
        try:
            yield read, pinned
        finally:
            loading.shown = None
