"""The texts of one engine: one lies in the caches, others are parked in host memory, or on disk, until they go on.

Whichever of them a prompt goes on with comes back into the caches, as far as both are the same; what a text would lose
by that is parked first. Parked texts share a limit of host memory: the least recently used leave.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from offload_triforce.errors import TriForceError
from offload_triforce.machine.memory import free_on_host
from offload_triforce.runtime.held import HeldText, TextSource, text_bytes
from offload_triforce.runtime.ids import common_prefix
from offload_triforce.runtime.prefix import Start, find_start
from offload_triforce.runtime.session import Session

# Fewer tokens than these are read again rather than kept: about what one pass of the target reads in the time that
# they would take to be copied.
WORTH_KEEPING = 512
# A text that is not in the caches is brought there for no less than this.
LEAST_SHARED = 16
# Of the host memory that is free, so much is left to others where nobody has set a limit.
RESERVE = 0.25


@dataclass(eq=False)
class Text:
    """One text of an engine.

    Attributes:
        owned: it is a user's session, and goes on only where that asks for it.
        parked: where it lies; None is in the caches, or nowhere yet.
        home: where an older state of it lies on the shelf, while it is in the caches or in host memory.
        used: when, as a number that grows.
    """

    owned: bool = False
    parked: TextSource | None = None
    home: TextSource | None = None
    used: int = field(default=0)

    def go_home(self) -> None:
        """Its newest state is lost: the older one is what there is."""
        if self.parked is None:
            self.parked, self.home = self.home, None


class Shelf(Protocol):
    """Where texts go that memory has no room for."""

    def holds(self, source: TextSource | None) -> bool:
        """Whether a text lies there."""

    def put(self, source: TextSource, home: TextSource | None = None) -> TextSource | None:
        """Keep a text; returns where it lies from now on, if it could be kept. ``home``: where it lay before."""

    def drop(self, source: TextSource | None) -> None:
        """Forget one that was put there; others are left alone."""

    def texts(self) -> Iterable[TextSource]:
        """Those that are there, oldest first."""


class SessionPool:
    """All texts of one engine. It is used by whoever has the engine's turn.

    Attributes:
        seated: the text in the caches, if there is one.
    """

    def __init__(self, limit: int | None = None) -> None:
        """``limit``: bytes of parked texts in host memory; None is what is free, less a reserve."""
        self._limit = limit
        self.shelf: Shelf | None = None  # where the least recently used go; they are dropped where there is none
        self._texts: list[Text] = []
        self.seated: Text | None = None
        self._clock = 0

    @property
    def parked_bytes(self) -> int:
        """Bytes of host memory that parked texts take. Any thread may ask."""
        parked = [text.parked for text in list(self._texts)]  # each looked at once: they come and go meanwhile
        return sum(source.size for source in parked if isinstance(source, HeldText))

    def use(self, shelf: Shelf) -> None:
        """Go on with what lies on a shelf, and let texts leave for it."""
        self.shelf = shelf
        for source in shelf.texts():
            self.add(source)

    def add(self, parked: TextSource | None = None, owned: bool = False) -> Text:
        """A new text."""
        text = Text(owned, parked)
        self._texts.append(text)
        return text

    def remove(self, text: Text) -> None:
        """Forget a text."""
        if text in self._texts:
            self._texts.remove(text)
        for source in (text.parked, text.home):
            self._drop(source)
        text.parked = text.home = None
        if self.seated is text:
            self.seated = None

    def seat(self, session: Session, prompt: Tensor, wanted: Text | None = None) -> None:
        """Bring into the caches what is held of ``prompt`` (n,). ``session``: what the caches hold now.

        ``wanted``: the text that goes on; it may be empty. None is any that nobody owns, or a new one.
        """
        self._clock += 1
        best, start = self._best(session, prompt, wanted)
        session.fork = self._fork(session, prompt, start)
        text = wanted or (best if best is not None and not best.owned else self.add())
        before = self.seated
        if before is not None and self._is_worth_keeping(session.worth, before, text, start, best):
            self._park(before, session.source(), (text, best))
        if before is not None and before is not text and before is not best:
            before.go_home()
        if best is None or best is not before:
            self.seated = None  # until what is in the caches is known again
        if best is None:
            session.forget()
        elif best is not before and not self._take(session, best, start):
            self.seat(session, prompt, wanted)
            return
        rest, text.parked = text.parked, None
        if rest is not None and self._is_worth_keeping(_worth(rest, session), text, text, start, best):
            kept = self.add(rest)
            kept.used, kept.home, text.home = self._clock - 1, text.home, None
        elif self.shelf is not None and self.shelf.holds(rest):
            text.home = rest  # it stays valid there meanwhile, whatever ends this process
        self.seated, text.used = text, self._clock
        others = [each for each in self._texts if (each.owned or each.parked is not None) and each is not text]
        self._texts = [*others, text]

    def _take(self, session: Session, text: Text, start: Start) -> bool:
        """Bring a parked text into the caches; False if it turns out to be damaged: then it is forgotten.

        Raises:
            InputError, StorageError: it is a user's session.
        """
        try:
            session.take(text.parked, start)
        except TriForceError as error:
            session.forget()
            if text.owned:
                raise
            warnings.warn(f"a text that was kept is read again: {error}", RuntimeWarning, stacklevel=2)
            text.parked = None
            return False
        return True

    def _is_worth_keeping(self, held: int, text: Text, following: Text, start: Start, best: Text | None) -> bool:
        """Whether to keep what a text worth ``held`` tokens would lose, when ``following`` goes on from ``start`` of
        ``best``. A user's session that goes back has done so on purpose; other texts may be wanted again."""
        if text.owned:
            return text is not following and held > 0
        return held - (start.worth if text is best and text is following else 0) > WORTH_KEEPING

    def unseat(self, session: Session) -> None:
        """Park the text that is in the caches: they are about to go."""
        if self.seated is not None and session.worth:
            self._park(self.seated, session.source(), (self.seated,))
        self.lose()

    def keep_all(self, session: Session | None) -> None:
        """Let all texts leave for the shelf, that of ``session`` in the caches too, if there is a shelf."""
        if self.shelf is None:
            return
        if self.seated is not None and not self.seated.owned and session is not None and session.worth:
            self.shelf.put(session.source(), self.seated.home)
        for text in self._texts:
            if isinstance(text.parked, HeldText) and not text.owned:
                self._put(text, text.parked)

    def make_way(self) -> bool:
        """Let all parked texts that nobody owns leave memory; returns whether there were any."""
        leaving = [text for text in self._texts if isinstance(text.parked, HeldText) and not text.owned]
        for text in leaving:
            self._put(text, text.parked)
        return bool(leaving)

    def clear(self) -> None:
        """Forget all texts."""
        for text in self._texts:
            text.parked = text.home = None
        self._texts = [text for text in self._texts if text.owned]
        self.seated = None

    def lose(self) -> None:
        """The caches are gone, and the text that was there, but for what lies on the shelf."""
        if self.seated is not None:
            self.seated.go_home()
        self.seated = None

    def source(self, text: Text, session: Session | None) -> TextSource | None:
        """Where a text can be read from; None where nothing of it is held. ``session``: what the caches hold."""
        if text is self.seated and session is not None and session.worth:
            return session.source()
        return text.parked

    def _best(self, session: Session, prompt: Tensor, wanted: Text | None) -> tuple[Text | None, Start]:
        """The text that has most of a prompt, and how much of it stays. In doubt the wanted one, or that in place."""
        best, most = None, Start(0)
        for text in sorted(self._texts, key=lambda each: (each is not wanted, each is not self.seated, -each.used)):
            start = session.start(prompt) if text is self.seated else _parked_start(text.parked, prompt, session)
            least = 1 if text is self.seated or text is wanted else LEAST_SHARED
            if start is not None and start.worth >= max(least, most.worth + 1):
                best, most = text, start
        return best, most

    def _fork(self, session: Session, prompt: Tensor, start: Start) -> int:
        """Where a prompt leaves what is held, if that is worth a mark: others will leave it there as well.

        That is so of a system prompt, or a document that is asked about. 0 where texts can be cut without.
        """
        if session.cuttable:
            return 0
        held = [(session.ids, session.long)]
        held += [(text.parked.tokens, text.parked.long) for text in self._texts if text.parked is not None]
        alike = (ids for ids, long in held if session.turned_alike(long, prompt))
        shared = max((common_prefix(ids, prompt[:-1]) for ids in alike), default=0)
        return shared if shared - start.tokens > WORTH_KEEPING else 0

    def _park(self, text: Text, source: TextSource, staying: Sequence[Text | None]) -> None:
        """Keep a text out of the caches: in memory, on disk, or not at all. ``staying`` are about to be used."""
        if self._make_room(text_bytes(source), staying):
            text.parked = HeldText.copy(source)
        else:
            self._put(text, source)

    def has_room(self, size: int) -> bool:
        """Whether host memory may hold so many bytes more of the text in the caches; parked ones make way."""
        return self.seated is not None and self._make_room(size, ())

    def _make_room(self, size: int, staying: Sequence[Text | None]) -> bool:
        """The least recently used of parked texts leave until so many bytes fit; False if they cannot. Some stay."""
        if self._limit is not None and size > self._limit:
            return False
        while size > self._room():
            parked = [text for text in self._texts if isinstance(text.parked, HeldText) and text not in staying]
            if not parked:
                return False
            oldest = min(parked, key=lambda each: each.used)
            self._put(oldest, oldest.parked)
        return True

    def _put(self, text: Text, source: TextSource) -> None:
        """Let it leave for the shelf, if there is one; what lay there before stays, if that fails."""
        text.parked = None if self.shelf is None else self.shelf.put(source, text.home)
        if text.parked is None:
            text.go_home()
        text.home = None

    def _drop(self, source: TextSource | None) -> None:
        if self.shelf is not None:
            self.shelf.drop(source)

    def _room(self) -> int:
        """Bytes of host memory that parked texts may still take."""
        if self._limit is None:
            return int(free_on_host() * (1 - RESERVE))
        return self._limit - self.parked_bytes


def _worth(parked: TextSource, session: Session) -> int:
    """Reading so many tokens would be about as much work as what there is of a parked text."""
    return len(parked.tokens) + session.part_worth(parked.part)


def _parked_start(parked: TextSource | None, prompt: Tensor, session: Session) -> Start | None:
    """How much of a parked text a prompt goes on with."""
    if parked is None or not session.turned_alike(parked.long, prompt):
        return None
    shared = common_prefix(parked.tokens, prompt[:-1])
    if shared == len(parked.tokens) and (usable := session.usable(parked.part, shared, prompt)):
        worth = session.part_worth(parked.part, usable)
        return Start(shared, parked.checkpoints[-1] if parked.checkpoints else None, worth)
    if session.cuttable:
        return find_start(len(parked.tokens), (), shared, len(prompt) - 1, lambda tokens: True)
    known = [point for point in parked.checkpoints if point.tokens <= shared]
    return Start(known[-1].tokens, known[-1]) if known else None
