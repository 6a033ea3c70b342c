"""A conversation without a model: an engine with no more than a conversation looks at, and scripted answers."""

from types import SimpleNamespace

from transformers import GenerationConfig

from offload_triforce import Settings
from offload_triforce.speculation.stats import DecodeStats
from tests.byte_tokenizer import byte_tokenizer

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] == 'no' %}{{ raise_exception('not with me') }}{% endif %}"
    "<{{ message['role'] }}>{{ message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


class ScriptedStream:
    """An answer of these pieces. "^C" among them stands for somebody who cancels, "fail" raises."""

    def __init__(self, prompt, pieces, error, ending):
        self.stats = DecodeStats(prompt_tokens=len(prompt), passes=1, decode_s=1.0)
        self._pieces = iter(pieces)
        self._error, self._ending, self._cancelled, self.closed = error, ending, False, False

    def __iter__(self):
        return self

    def __next__(self):
        if self._cancelled:
            self.stats.interrupted = True
            raise StopIteration
        piece = next(self._pieces, None)
        if piece is None:
            self.stats.ending = self._ending
            raise StopIteration
        if piece == "fail":
            raise self._error
        if piece == "^C":
            self.cancel()
            return next(self)
        self.stats.new_tokens += len(piece)
        return piece

    def cancel(self):
        self._cancelled = True

    def close(self):
        self.closed = True
        if self.stats.ending is None:
            self.stats.interrupted = True


class ScriptedSession:
    """Answers in turn; what it was asked is in ``asked``: (text, options)."""

    part_tokens = 0

    def __init__(self, tokenizer, *answers, error=None, ending="stop"):
        self.answers, self.asked, self.closed = list(answers), [], False
        self._tokenizer, self._error, self._ending = tokenizer, error, ending

    def stream(self, prompt, **options):
        self.asked.append((self._tokenizer.decode(prompt), options))
        if self._error is not None and not self.answers:
            raise self._error
        answer = self.answers.pop(0) if self.answers else ["ok"]
        return ScriptedStream(prompt, [answer] if isinstance(answer, str) else answer, self._error, self._ending)

    def save(self, path):
        self.saved = path

    @property
    def tokens(self):
        return range(len(self.asked))

    def close(self):
        self.closed = True


def scripted_engine(template=TEMPLATE, positions=4096, do_sample=False, longrope_switch=None, **settings):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return SimpleNamespace(
        tokenizer=tokenizer,
        layout=SimpleNamespace(max_positions=positions, longrope_switch=longrope_switch),
        settings=Settings(**settings),
        model=SimpleNamespace(generation_config=GenerationConfig(do_sample=do_sample)),
    )
