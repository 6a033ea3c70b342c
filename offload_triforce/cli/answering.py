"""An answer on its way to the user: streamed, kept in a file, or as JSON; it is never lost."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload_triforce.cli.common import check_writable
from offload_triforce.cli.ending import notes, say
from offload_triforce.errors import InputError, TriForceError

if TYPE_CHECKING:
    from offload_triforce.cli.kept_session import KeptSession
    from offload_triforce.engine import TriForce
    from offload_triforce.generation.answer import Generation, TextStream


class Sink:
    """Where an answer goes."""

    def __init__(self, output: str | None, as_json: bool, prompt_file: str | None = None) -> None:
        """``output``: a file, or None (or "-") for standard output. ``prompt_file``: what must not be overwritten.

        Raises:
            InputError: there is nowhere for the answer to go.
        """
        self._path = None if output in (None, "-") else Path(os.path.expanduser(output))
        self._as_json = as_json
        if self._path is not None:
            if prompt_file not in (None, "-") and _same(self._path, Path(os.path.expanduser(prompt_file))):
                raise InputError(f"--output {output} would overwrite the prompt; name another file")
            check_writable(self._path)
        elif sys.stdout is None:
            raise InputError("standard output is closed; give --output, or leave it open")

    def piece(self, text: str) -> None:
        """Some of the answer."""
        if self._path is None and not self._as_json:
            sys.stdout.write(text)
            sys.stdout.flush()

    def finish(self, result: Generation) -> None:
        """The whole answer, or what there is of it.

        Raises:
            InputError: the file could not be written; the answer is on standard output then.
        """
        from offload_triforce.cli import report

        whole = report.as_json(result) if self._as_json else result.text
        if self._path is None:
            print(whole if self._as_json else "", flush=True)
            return
        try:
            self._path.write_text(whole + "\n", encoding="utf-8", errors="replace")
        except OSError as error:
            print(whole, flush=True)
            raise InputError(
                f"{self._path} could not be written: {error.strerror}; the answer is on standard output instead"
            ) from error


def answer(
    engine: TriForce,
    ids: list[int],
    seed: int | None,
    sink: Sink,
    verbose: bool,
    sampling: dict[str, Any],
    kept: KeptSession | None = None,
) -> None:
    """Decode and report. What came before an interruption or a mistake is given out first, and ``kept`` saved."""
    from offload_triforce.cli import report

    stopped: BaseException | None = None
    with engine, report.bars(notes) as (progress, pinning):
        asked = engine if kept is None else kept.session
        stream = asked.stream(ids, seed=seed, progress=progress, pinning=pinning, **sampling)
        say(report.opening(engine))
        try:
            for piece in stream:
                sink.piece(piece)
        except (KeyboardInterrupt, TriForceError) as error:
            stopped = error
        result = stream.result
        link = engine.layout.device.type == "cuda" or engine.settings.link_gbps is not None
        stopped = _save(kept, stream, stopped)
    if stopped is None or result.token_ids:
        sink.finish(result)
    say(report.closing(result))
    for line in report.summary(result.stats, link) if verbose else ():
        say(line)
    if stopped is not None:
        raise stopped


def _save(kept: KeptSession | None, stream: TextStream, stopped: BaseException | None) -> BaseException | None:
    """Save the session, if there is one; returns what the command ends with."""
    stream.close()
    try:
        if kept is not None:
            kept.save()
    except (KeyboardInterrupt, TriForceError) as error:
        return stopped or error
    return stopped


def _same(first: Path, second: Path) -> bool:
    return os.path.realpath(first) == os.path.realpath(second)
