"""An answer's text as a conversation shows it: thoughts told apart, and cut where the next turn would begin."""

from __future__ import annotations

from enum import Enum

OPENS, CLOSES = "<think>", "</think>"


def held_back(text: str, mark: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``mark``."""
    longest = min(len(text), len(mark) - 1)
    return next((size for size in range(longest, 0, -1) if mark.startswith(text[-size:])), 0)


class _Part(Enum):
    BEGINNING, THOUGHT, SAID, OVER = range(4)


class ReplyText:
    """Takes the pieces of an answer and gives them on as (thought, text).

    Thinking models begin with ``<think>``, if their template has not written that already, and close it with
    ``</think>``. Only there is it a mark: an answer may be about such words. White space around the marks is theirs.
    """

    def __init__(self, thinking: bool = False, stop: str | None = None) -> None:
        """``thinking``: the prompt has opened it. ``stop``: the text ends before this, which does not belong to it."""
        self._part = _Part.THOUGHT if thinking else _Part.BEGINNING
        self._stop = stop
        self._waiting = ""
        self._said: list[str] = []
        self._thoughts: list[str] = []

    @property
    def said(self) -> str:
        """What was said so far, without the thoughts."""
        return "".join(self._said)

    @property
    def thoughts(self) -> str:
        """What was thought so far."""
        return "".join(self._thoughts)

    def push(self, piece: str, last: bool = False) -> list[tuple[bool, str]]:
        """New text in; out comes what can be told apart by now, in order. ``last``: nothing is held back."""
        self._waiting += piece
        out: list[tuple[bool, str]] = []
        before = None
        while self._part is not before:  # a mark that was found changes the part, and then there may be more to say
            before = self._part
            if before is _Part.BEGINNING:
                self._begin(last)
            elif before is _Part.THOUGHT:
                self._think(out, last)
            elif before is _Part.SAID:
                self._say(out, last)
        return out

    def _begin(self, last: bool) -> None:
        text = self._waiting.lstrip()
        if text.startswith(OPENS):
            self._waiting, self._part = text[len(OPENS) :], _Part.THOUGHT
        elif last or not OPENS.startswith(text):
            self._part = _Part.SAID

    def _think(self, out: list[tuple[bool, str]], last: bool) -> None:
        if not self._thoughts:
            self._waiting = self._waiting.lstrip()
        text, closed, rest = self._waiting.partition(CLOSES)
        if closed:
            self._waiting, self._part = rest, _Part.SAID
            text = text.rstrip()
        elif not last:
            text = text[: len(text) - held_back(text, CLOSES)]
            text = text.rstrip()  # it may be the white space before the mark
            self._waiting = self._waiting[len(text) :]
        else:
            self._waiting = ""
        self._give(out, True, text)

    def _say(self, out: list[tuple[bool, str]], last: bool) -> None:
        if self._thoughts and not self._said:
            self._waiting = self._waiting.lstrip()
        text, self._waiting = self._waiting, ""
        if self._stop is not None:
            text, found, _ = text.partition(self._stop)
            if found:
                self._part = _Part.OVER
            elif not last and (size := held_back(text, self._stop)):
                text, self._waiting = text[:-size], text[-size:]
        self._give(out, False, text)

    def _give(self, out: list[tuple[bool, str]], thought: bool, text: str) -> None:
        if text:
            (self._thoughts if thought else self._said).append(text)
            out.append((thought, text))
