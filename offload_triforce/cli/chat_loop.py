"""A conversation, line by line: what is typed is a command or a question, and a mistake ends nothing."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from offload_triforce.cli.chat_commands import answers, run_command, short, split_command
from offload_triforce.errors import TriForceError
from offload_triforce.generation.ending import LENGTH

if TYPE_CHECKING:
    from offload_triforce.cli.chat_screen import Screen
    from offload_triforce.cli.chat_store import Store
    from offload_triforce.generation.dialogue import Dialogue, Reply
    from offload_triforce.generation.documents import Document

LEAVE = "Ctrl-C again, or Ctrl-D, leaves; /help lists what there is"


class Chat:
    """One conversation on a screen.

    Attributes:
        dialogue, store, screen: what it consists of. link: there is one, be it emulated.
    """

    def __init__(self, dialogue: Dialogue, store: Store, screen: Screen, link: bool = False) -> None:
        self.dialogue, self.store, self.screen, self.link = dialogue, store, screen, link

    def run(self) -> None:
        """Until somebody leaves."""
        pressed = False  # Ctrl-C, and nothing since
        while True:
            try:
                if pressed:
                    self.screen.say(LEAVE)  # within: who presses again may be faster than the prompt
                text = self.screen.read()
            except EOFError:
                return
            except KeyboardInterrupt:
                if pressed:
                    return
                pressed = True
                continue
            pressed = False
            if not self.line(text):
                return

    def line(self, text: str) -> bool:
        """Do what was typed; False if it ends the conversation."""
        if not text.strip():
            return True
        try:
            if (command := split_command(text)) is not None:
                return run_command(self, *command)
            question = text.strip("\n")
            self.answer(self.dialogue.ask, question.replace("/", "", 1) if question.startswith("//") else question)
        except TriForceError as error:
            self.screen.mistake(error)
        except KeyboardInterrupt:  # as a file was read, or more than once in an answer
            self.screen.say("stopped; /retry asks again")
        return True

    def answer(self, ask: Callable[..., Reply], *args: Any) -> None:
        """Show an answer as it comes; Ctrl-C stops it.

        Raises:
            InputError: it cannot be asked for. MemoryLimitError: there is no room; what was said until then is kept.
        """
        reply: Reply | None = None
        began = False
        try:
            with self.screen.answering(), Stopping() as stopping, contextlib.ExitStack() as bars:
                progress, pinning = bars.enter_context(self.screen.reading(self.store.loading))
                reply = ask(*args, progress=progress, pinning=pinning)
                stopping.aim(reply.cancel)
                with reply:
                    for thought, piece in reply:
                        bars.close()  # the prompt has been read
                        began = True
                        self.screen.piece(thought, piece)
        finally:
            if began:
                self.screen.finish()
            if reply is not None and reply.kept:
                self.keep()
        self._say_ending(reply)

    def attach(self, document: Document) -> None:
        """Put a document into the next question.

        Raises:
            InputError: it is too long.
        """
        tokens = self.dialogue.attach(document)
        self.screen.say(f"{document.name}: {tokens:,} tokens, for the next message")

    def load(self, name: str, new: bool = False) -> None:
        """Go on with a conversation that was kept. ``new``: or begin it.

        Raises:
            InputError: there is none, or it is damaged; the present one stays.
        """
        why_not = self.store.open(name, self.dialogue, new)
        if why_not is not None:
            self.screen.say(f"what was read of {name} cannot be used again, and will be read anew: {why_not}")
        if not self.dialogue.exchanges:
            self.screen.say(f"{name} is new; it is kept from now on, after each answer")
            return
        question = self.dialogue.messages[-2]["content"]
        self.screen.say(f"{name}: {answers(self.dialogue.exchanges)}, the last to: {short(question)}")

    def keep(self) -> None:
        """Keep the messages, if the conversation has a name. A full disk does not end it."""
        try:
            self.store.keep(self.dialogue.messages)
        except TriForceError as error:
            self.screen.mistake(error)

    def _say_ending(self, reply: Reply) -> None:
        stats = reply.stats
        if not reply.kept:
            self.screen.say("stopped before anything was said; /retry asks again")
        elif stats.interrupted:
            self.screen.say("stopped; what was said is kept: /retry answers again, /undo takes it back")
        elif stats.ending == LENGTH:
            limit = self.dialogue.limit
            full = limit is not None and self.dialogue.used >= limit
            if full:
                words = f"where the conversation has the {limit:,} tokens that fit; /undo takes the last exchange back"
            else:
                words = f"at its limit of {stats.new_tokens:,} tokens; /set max_new_tokens, or ask for more"
            self.screen.say(f"the answer was cut {words}")
        elif not any(message.get("content") for message in self.dialogue.messages[-1:]):
            self.screen.say("the model said nothing; /retry asks again")


class Stopping:
    """Within, the first Ctrl-C cancels an answer, which then ends after its present step; the second raises."""

    def __init__(self) -> None:
        self._pressed = False
        self._cancel: Callable[[], None] | None = None
        self._before: Any = None
        # Python gives signals to no other thread.
        self._listens = threading.current_thread() is threading.main_thread()

    def aim(self, cancel: Callable[[], None]) -> None:
        """From now on there is something to cancel; maybe somebody has asked for it already."""
        self._cancel = cancel
        if self._pressed:
            cancel()

    def __enter__(self) -> Stopping:
        if self._listens:
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._listens:
            signal.signal(signal.SIGINT, self._before)

    def _handle(self, *_: object) -> None:
        if self._pressed:
            raise KeyboardInterrupt
        self._pressed = True
        if self._cancel is not None:
            self._cancel()
