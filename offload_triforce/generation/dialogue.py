"""A conversation: its messages, what goes into the next one, and how each answer is asked of a session.

It knows no terminal: the command ``chat`` shows it, tests drive it alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from offload_triforce.config import Settings
from offload_triforce.errors import InputError
from offload_triforce.generation.answer import TextStream
from offload_triforce.generation.chat import PLAIN_STOP, chat_ids, has_chat_format, plain_chat
from offload_triforce.generation.documents import Document, with_documents
from offload_triforce.generation.reply_text import OPENS, ReplyText
from offload_triforce.model.layout import ModelLayout
from offload_triforce.speculation.stats import DecodeStats

LEAST_ANSWER = 16  # tokens: where fewer would fit, the conversation is full
NEW_TOKENS = 2048  # of an answer, unless somebody says otherwise or less would fit
MOST_SEED = 2**31

Message = dict[str, Any]


class Engine(Protocol):
    """What a conversation looks at in its engine."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    layout: ModelLayout
    settings: Settings


class Asked(Protocol):
    """What answers: a session of the engine's."""

    def stream(self, prompt: Sequence[int], **options: Any) -> TextStream:
        """See ``TriForce.stream``."""


class Reply:
    """One answer on its way: iterate for (thought, text). It enters the conversation when it is over, or closed.

    An answer that was interrupted stays as far as it was said. Where nothing was said, the conversation is as before.
    """

    def __init__(
        self, dialogue: Dialogue, messages: list[Message], stream: TextStream, text: ReplyText, asked: str | None
    ) -> None:
        """``messages``: up to the question. ``asked``: it, as it was typed; None if it is asked again."""
        self.stats: DecodeStats = stream.stats
        self.kept = False  # it has entered the conversation
        self._dialogue, self._messages, self._stream, self._text = dialogue, messages, stream, text
        self._asked = asked
        self._pieces = self._read()
        self._settled = False

    def __iter__(self) -> Iterator[tuple[bool, str]]:
        return self._pieces

    def cancel(self) -> None:
        """End it at the next pass or chunk of the prompt. From any thread, and from a signal's handler."""
        self._stream.cancel()

    def close(self) -> None:
        """End it here, and settle what becomes of it."""
        self._stream.close()
        if self._settled:
            return
        self._settled = True
        self._text.push("", last=True)
        said = self._text.said.strip()
        whole = self.stats.ending is not None
        self.kept = whole or bool(said)
        if self.kept:
            answer = {"role": "assistant", "content": said}
            if self._text.thoughts:  # the template's business: most leave them out of what is past
                answer["reasoning_content"] = self._text.thoughts
            self._dialogue._enter([*self._messages, answer], self.stats, self._asked is not None)
        else:
            self._dialogue._unanswered = self._asked

    def __enter__(self) -> Reply:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read(self) -> Iterator[tuple[bool, str]]:
        for piece in self._stream:
            yield from self._text.push(piece)
        yield from self._text.push("", last=True)


class Dialogue:
    """A conversation with one engine.

    Attributes:
        messages: all that was said, the system's first, if there is one; questions and answers in turns.
        documents: what goes into the next question.
        options: of the answers, as ``TriForce.stream`` takes them; what is not among them is the model's own.
        seed: of the next answer; the same until one is retried.
        stats: of the latest answer, or None. used: tokens of the conversation so far.
    """

    def __init__(
        self,
        engine: Engine,
        session: Asked,
        messages: Sequence[Message] = (),
        options: dict[str, Any] | None = None,
        seed: int | None = None,
    ) -> None:
        """``messages``: how the conversation begins. ``seed``: None draws one."""
        if engine.tokenizer is None:
            raise InputError("a conversation needs a model with a tokenizer")
        self.engine, self.session, self._tokenizer = engine, session, engine.tokenizer
        self.messages: list[Message] = list(messages)
        self.documents: list[Document] = []
        self.options = dict(options or {})
        self.seed = random.randrange(MOST_SEED) if seed is None else seed
        self.stats: DecodeStats | None = None
        self.used = 0
        self.plain = not has_chat_format(engine.tokenizer)
        self._answered: dict[str, Any] | None = None  # options of the latest answer
        self._unanswered: str | None = None  # a question that got no answer at all
        self._forget()

    @property
    def limit(self) -> int | None:
        """Most tokens that the conversation can have; None if nothing says."""
        limits = (self.engine.settings.context, self.engine.layout.max_positions)
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def greedy(self) -> bool:
        """Whether the same question always gets the same answer."""
        if (temperature := self.options.get("temperature")) is not None:
            return temperature == 0
        config: GenerationConfig = self.engine.model.generation_config
        return not config.do_sample

    @property
    def exchanges(self) -> int:
        """How many questions have been answered."""
        return sum(message["role"] == "assistant" for message in self.messages)

    def attach(self, document: Document) -> int:
        """Put a document into the next question. Returns its tokens.

        Raises:
            InputError: it cannot fit, whatever is asked.
        """
        tokens = len(self._tokenizer(document.text).input_ids)
        if self.limit is not None and tokens > self.limit:
            raise InputError(
                f"{document.name} has {tokens:,} tokens, {tokens - self.limit:,} more than the {self.limit:,} that a "
                f"conversation can have here{self._way_out()}"
            )
        self.documents.append(document)
        return tokens

    def ask(self, question: str, **how: Any) -> Reply:
        """Ask something. ``how``: further arguments of ``TriForce.stream``, such as ``progress``.

        Raises:
            InputError: there is nothing to ask, or it does not fit; the conversation stays as it is.
        """
        content = with_documents(self.documents, question)
        if not content.strip():
            raise InputError("there is nothing to ask; type a question")
        try:
            return self._answer([*self.messages, {"role": "user", "content": content}], question, how)
        except KeyboardInterrupt:
            self._unanswered = question
            raise

    def retry(self, **how: Any) -> Reply:
        """Ask the latest question again, with another seed. An older answer stays until there is another.

        Raises:
            InputError: there is none, or the answer would be the same.
        """
        if self._unanswered is not None:
            return self.ask(self._unanswered, **how)
        if not self.exchanges:
            raise InputError("nothing has been answered yet, so there is nothing to try again")
        whole = self.stats is not None and not self.stats.interrupted
        if self.greedy and whole and self._answered == self.options:
            raise InputError(
                "the answer would be the same: nothing is drawn at temperature 0; /set temperature 0.7 first"
            )
        self.seed = (self.seed + 1) % MOST_SEED
        return self._answer(self.messages[:-1], None, how)

    def undo(self) -> str:
        """Take the latest question and its answer back. Returns the question.

        Raises:
            InputError: there is none.
        """
        if not self.exchanges:
            raise InputError("nothing has been answered yet, so there is nothing to take back")
        *self.messages, question, _ = self.messages
        self._forget()
        return str(question["content"])

    def clear(self) -> None:
        """Begin anew; the system's instructions stay."""
        self.begin(self.messages[:1] if self.messages and self.messages[0]["role"] == "system" else [])

    def begin(self, messages: Sequence[Message]) -> None:
        """Go on from these messages."""
        self.messages, self.documents = list(messages), []
        self._forget()

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of messages, up to where the next answer begins.

        Raises:
            InputError: the model's chat template refuses them.
        """
        if self.plain:
            return list(self._tokenizer(plain_chat(messages)).input_ids)
        return chat_ids(self._tokenizer, messages)

    def _answer(self, messages: list[Message], asked: str | None, how: dict[str, Any]) -> Reply:
        ids = self.ids(messages)
        options = {**self.options, "max_new_tokens": self._room(len(ids))}
        if self.plain:
            options["stop_strings"] = [PLAIN_STOP]
        stream = self.session.stream(ids, seed=self.seed, **options, **how)
        thinking = not self.plain and self._tokenizer.decode(ids[-16:]).rstrip().endswith(OPENS)
        return Reply(self, messages, stream, ReplyText(thinking, PLAIN_STOP if self.plain else None), asked)

    def _enter(self, messages: list[Message], stats: DecodeStats, new: bool) -> None:
        """An answer is over. ``new``: its question took the documents along."""
        self.messages, self.stats = messages, stats
        self.documents = [] if new else self.documents
        self._answered, self._unanswered = dict(self.options), None
        self.used = stats.prompt_tokens + stats.new_tokens

    def _forget(self) -> None:
        """What there was about the latest answer: it is another one now."""
        self.stats = self._answered = self._unanswered = None
        try:
            self.used = len(self.ids(self.messages)) if self.messages else 0
        except InputError:  # the template refuses instructions alone
            self.used = 0

    def _room(self, prompt: int) -> int:
        """How many tokens an answer may have.

        Raises:
            InputError: too few; by how much.
        """
        wanted = int(self.options.get("max_new_tokens") or NEW_TOKENS)
        if self.limit is None:
            return wanted
        least = min(wanted, LEAST_ANSWER)
        if (over := prompt + least - self.limit) > 0:
            raise InputError(
                f"with this the conversation has {prompt:,} tokens, and an answer needs {least}: {over:,} more than "
                f"the {self.limit:,} that fit here; it stays as it was: /undo takes the last exchange back, /clear "
                f"begins anew{self._way_out()}"
            )
        switch = self.engine.layout.longrope_switch
        room = min(wanted, self.limit - prompt)
        return min(room, switch - prompt) if switch is not None and prompt < switch else room

    def _way_out(self) -> str:
        """Where the limit is not the model's."""
        most = self.engine.layout.max_positions
        if self.engine.settings.context is None or (most is not None and self.limit == most):
            return ""
        model = "" if most is None else f", up to the model's {most:,}"
        return f"; --context sets how many fit{model}"
