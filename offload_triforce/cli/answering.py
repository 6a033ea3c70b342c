"""Answers on their way to the user: streamed, kept in a file, or as JSON; they are never lost."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload_triforce.cli.common import check_writable
from offload_triforce.cli.ending import notes, say
from offload_triforce.cli.loading import Loading
from offload_triforce.errors import InputError, TriForceError

if TYPE_CHECKING:
    from offload_triforce.cli.kept_session import KeptSession
    from offload_triforce.engine import TriForce
    from offload_triforce.generation.answer import Generation


@dataclass(frozen=True)
class Question:
    """``ask``: as it was given, or None where a text is continued. ``ids``: of the whole prompt."""

    ask: str | None
    ids: list[int]


class Sink:
    """Where answers go."""

    def __init__(
        self, output: str | None, as_json: bool, prompt_file: str | None = None, several: bool = False
    ) -> None:
        """Begin.

        Args:
            output: a file, or None (or "-") for standard output.
            prompt_file: what must not be overwritten.
            several: each answer stands under its question; their JSON is one object, with a list of "answers".

        Raises:
            InputError: there is nowhere for the answers to go.
        """
        self._path = None if output in (None, "-") else Path(os.path.expanduser(output))
        self._as_json, self._several = as_json, several
        self._done: list[tuple[Question, Generation]] = []
        if self._path is not None:
            if prompt_file not in (None, "-") and _same(self._path, Path(os.path.expanduser(prompt_file))):
                raise InputError(f"--output {output} would overwrite the prompt; name another file")
            check_writable(self._path)
        elif sys.stdout is None:
            raise InputError("standard output is closed; give --output, or leave it open")

    def begin(self, question: Question) -> None:
        """The answer to this comes next."""
        if self._several:
            self.piece(f"{_heading(question)}\n\n")

    def piece(self, text: str) -> None:
        """Some of the answer."""
        if self._path is None and not self._as_json:
            sys.stdout.write(text)
            sys.stdout.flush()

    def add(self, question: Question, result: Generation) -> None:
        """The whole answer, or what there is of it."""
        self._done.append((question, result))
        self.piece("\n\n" if self._several else "\n")

    def finish(self) -> None:
        """All answers are there, or what there will be of them.

        Raises:
            InputError: the file could not be written; the answers are on standard output then.
        """
        if not self._done:
            return
        whole = self._json() if self._as_json else self._text()
        if self._path is None:
            if self._as_json:
                print(whole, flush=True)
            return
        try:
            self._path.write_text(whole + "\n", encoding="utf-8", errors="replace")
        except OSError as error:
            print(whole, flush=True)
            what = "answers are" if self._several else "answer is"
            raise InputError(
                f"{self._path} could not be written: {error.strerror}; the {what} on standard output instead"
            ) from error

    def _json(self) -> str:
        from offload_triforce.cli import report

        if not self._several:
            return report.as_json(self._done[0][1])
        return json.dumps({"answers": [{"ask": each.ask, **report.as_dict(result)} for each, result in self._done]})

    def _text(self) -> str:
        if not self._several:
            return self._done[0][1].text
        return "\n\n".join(f"{_heading(question)}\n\n{result.text}" for question, result in self._done)


def answer(
    engine: TriForce,
    questions: Sequence[Question],
    seed: int | None,
    sink: Sink,
    verbose: bool,
    sampling: dict[str, Any],
    kept: KeptSession | None = None,
) -> None:
    """Decode and report. What came before an interruption or a mistake is given out first, and ``kept`` saved.

    Several questions are answered in turn, in one session: what they have in common is read once.
    """
    _check_lengths(engine, questions, sampling["max_new_tokens"])
    with engine, _asked(engine, questions, kept) as asked:
        try:
            loading = kept and kept.loading
            for number, question in enumerate(questions):
                _answer(engine, asked, question, seed, sink, verbose, sampling, first=number == 0, loading=loading)
        finally:
            try:
                sink.finish()
            finally:
                if kept is not None:
                    kept.save()


def _answer(
    engine: TriForce,
    asked: Any,
    question: Question,
    seed: int | None,
    sink: Sink,
    verbose: bool,
    sampling: dict[str, Any],
    first: bool,
    loading: Loading | None,
) -> None:
    from offload_triforce.cli import report

    stopped: BaseException | None = None
    with report.bars(notes, loading) as (progress, pinning):
        stream = asked.stream(question.ids, seed=seed, progress=progress, pinning=pinning, **sampling)
        if first:
            say(report.opening(engine))
        try:
            sink.begin(question)
            for piece in stream:
                sink.piece(piece)
        except (KeyboardInterrupt, TriForceError) as error:
            stopped = error
        result = stream.result
        link = engine.layout.device.type == "cuda" or engine.settings.link_gbps is not None
        stream.close()
    if stopped is None or result.token_ids:
        sink.add(question, result)
    say(report.closing(result))
    for line in report.summary(result.stats, link) if verbose else ():
        say(line)
    if stopped is not None:
        raise stopped


@contextmanager
def _asked(engine: TriForce, questions: Sequence[Question], kept: KeptSession | None) -> Iterator[Any]:
    """Who answers: a session where there are several questions or one is kept, else the engine itself."""
    if kept is not None:
        yield kept.session
    elif len(questions) == 1:
        yield engine
    else:
        with engine.session() as session:
            yield session


def _check_lengths(engine: TriForce, questions: Sequence[Question], new_tokens: int) -> None:
    """Look at all texts before the first is read.

    Raises:
        InputError: one of them is too long.
    """
    from offload_triforce.generation.checks import check_length

    for question in questions:
        check_length(engine.layout, engine.settings, len(question.ids), new_tokens)


def _heading(question: Question) -> str:
    """A question above its answer, as a quotation."""
    return "\n".join(f"> {line}" for line in (question.ask or "").strip().splitlines())


def _same(first: Path, second: Path) -> bool:
    return os.path.realpath(first) == os.path.realpath(second)
