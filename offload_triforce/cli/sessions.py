"""The commands ``sessions list``, ``show``, ``rm`` and ``verify``: what lies on disk of texts that were read before."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from offload_triforce.cli.common import examples, guarded
from offload_triforce.cli.ending import notes, paper, say
from offload_triforce.cli.options import AsJson
from offload_triforce.errors import InputError
from offload_triforce.machine.units import gigabytes

LIST_EXAMPLES = examples("offload-triforce sessions list", "offload-triforce sessions list --json")
SHOW_EXAMPLES = examples("offload-triforce sessions show report", "offload-triforce sessions show ./kept/report")
RM_EXAMPLES = examples("offload-triforce sessions rm report", "offload-triforce sessions rm report ./kept/old --yes")
VERIFY_EXAMPLES = examples("offload-triforce sessions verify", "offload-triforce sessions verify report")

Names = Annotated[list[str], typer.Argument(help="Names that list shows, or paths with a slash in them.")]
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@guarded
def list_sessions(as_json: AsJson = False) -> None:
    """List the sessions that are kept by name."""
    from offload_triforce.machine.folders import sessions_folder
    from offload_triforce.runtime.session_folder import list_texts

    found = list_texts(sessions_folder())
    if as_json:
        typer.echo(json.dumps({"folder": str(sessions_folder()), "sessions": [as_row(one) for one in found]}))
        return
    if not found:
        say(f"there are none in {sessions_folder()}; `offload-triforce generate --session NAME` begins one")
        return
    figures = (Column(name, justify="right") for name in ("tokens", "size"))
    table = Table("name", *figures, "saved", "model", box=None, padding=(0, 2, 0, 0))
    for one in found:
        row = as_row(one)
        if one.manifest is None:
            table.add_row(one.name, "-", "-", "-", "damaged: see `offload-triforce sessions show`")
        else:
            table.add_row(one.name, f"{row['tokens']:,}", gigabytes(row["bytes"]), row["saved"], row["model"])
    paper().print(table)


@guarded
def show(
    name: Annotated[str, typer.Argument(help="A name that list shows, or a path with a slash in it.")],
    as_json: AsJson = False,
) -> None:
    """Show what a session holds, and of which model it is."""
    from offload_triforce.runtime.session_folder import describe, load_manifest, session_path

    one = describe(session_path(name))
    if one.problem is not None:
        load_manifest(one.path)  # says it itself, if it is the manifest
        raise InputError(one.problem)
    row = as_row(one)
    if as_json:
        typer.echo(json.dumps(row))
        return
    table = Table(Column(style="dim"), Column(overflow="fold"), box=None, show_header=False, padding=(0, 2, 0, 0))
    values = {
        "folder": row["path"],
        "model": row["model"],
        "tokens": f"{row['tokens']:,}" + (f", and {row['tokens_in_part']:,} in part" if row["tokens_in_part"] else ""),
        "size": f"{gigabytes(row['bytes'])} in {row['files']:,} files",
        "saved": row["saved"],
        "keys and values": f"{row['layers']} layers of {row['kv_heads']} KV heads of {row['head_dim']}, {row['dtype']}",
        "checkpoints": ", ".join(f"{tokens:,}" for tokens in row["checkpoints"]) or "none",
    }
    for label, value in values.items():
        table.add_row(label, value)
    paper().print(table)


@guarded
def rm(
    names: Names,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove sessions, damaged ones too."""
    from offload_triforce.runtime.session_folder import check_there, describe, remove_text, session_path

    paths = [session_path(name) for name in names]
    for path in paths:
        check_there(path)
        if not yes:
            one = describe(path)
            what = f"{one.manifest.length:,} tokens, {gigabytes(one.manifest.size)}" if one.manifest else "not readable"
            typer.confirm(f"Remove {path} ({what})?", abort=True, err=True)
        say(f"removed {path}: {gigabytes(remove_text(path))}")


@guarded
def verify(
    names: Annotated[list[str] | None, typer.Argument(help="Names or paths; all that list shows without.")] = None,
) -> None:
    """Read whole sessions and compare all checksums."""
    from offload_triforce.machine.folders import sessions_folder
    from offload_triforce.runtime.session_check import verify_text
    from offload_triforce.runtime.session_folder import list_texts, session_path

    paths = [session_path(name) for name in names or ()] or [one.path for one in list_texts(sessions_folder())]
    problems: list[str] = []
    for path in paths:
        try:
            with bytes_bar(f"reading {path.name}") as told:
                manifest = verify_text(path, told)
            typer.echo(f"{path}: whole, {manifest.length:,} tokens, {gigabytes(manifest.size)}")
        except InputError as error:
            if len(paths) == 1:
                raise
            problems.append(str(error))
            say(str(error))
    if problems:
        raise InputError(f"{len(problems)} of {len(paths)} sessions are damaged, the first: {problems[0]}")
    if not paths:
        say(f"there are none in {sessions_folder()}")


def as_row(one: Any) -> dict[str, Any]:
    """A ``SessionSummary`` for JSON."""
    row: dict[str, Any] = {"name": one.name, "path": str(one.path), "problem": one.problem}
    manifest = one.manifest
    if manifest is None:
        return row
    return row | {
        "model": manifest.model.name,
        "tokens": manifest.length,
        "tokens_in_part": manifest.ids - manifest.length,
        "bytes": manifest.size,
        "files": len(manifest.contents) + 1,
        "saved": time.strftime("%Y-%m-%d %H:%M", time.localtime(manifest.saved)),
        "dtype": _DTYPES.get(manifest.dtype, manifest.dtype),
        "layers": manifest.layers,
        "kv_heads": manifest.kv_heads,
        "head_dim": manifest.head_dim,
        "checkpoints": [point.tokens for point in manifest.points],
    }


@contextlib.contextmanager
def bytes_bar(words: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar of bytes, on a terminal; it vanishes at the end."""
    if not notes.is_interactive:
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=notes, transient=True) as bar:
        task = bar.add_task(words, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
