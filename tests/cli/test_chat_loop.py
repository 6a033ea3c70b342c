"""Commands and questions on a screen that is a list: no model, no terminal."""

import contextlib
import signal

import pytest

from offload_triforce import InputError, MemoryLimitError
from offload_triforce.cli.chat_commands import COMMANDS, split_command
from offload_triforce.cli.chat_loop import Chat, Stopping
from offload_triforce.cli.chat_store import Store, names
from offload_triforce.generation.dialogue import Dialogue
from offload_triforce.generation.transcript import FILE
from offload_triforce.runtime.session_folder import MANIFEST
from tests.generation.talk import ScriptedSession, scripted_engine


class ListScreen:
    """Types what it is given, and remembers what it is shown."""

    def __init__(self, *lines):
        self.lines, self.told, self.wrong, self.shown, self.finished = list(lines), [], [], "", 0

    def read(self):
        if not self.lines:
            raise EOFError
        if isinstance(self.lines[0], BaseException):
            raise self.lines.pop(0)
        return self.lines.pop(0)

    def say(self, line):
        self.told.append(line)

    def mistake(self, error):
        self.wrong.append(str(error))

    def piece(self, thought, text):
        self.shown += f"({text})" if thought else text

    def finish(self):
        self.finished += 1

    def reading(self, loading):
        return contextlib.nullcontext((None, None))

    def answering(self):
        return contextlib.nullcontext()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFLOAD_TRIFORCE_CACHE", str(tmp_path))
    return tmp_path / "sessions"


@pytest.fixture
def begin():
    def make(*answers, error=None, ending="stop", caches=False, **how):
        engine = scripted_engine(**how)
        sessions = []

        def session():
            sessions.append(ScriptedSession(engine.tokenizer, *answers, error=error, ending=ending))
            return sessions[-1]

        engine.session = session
        if caches:
            engine.load_session = lambda path, progress: session()
        store = Store(engine, "a model")
        chat = Chat(Dialogue(engine, store.session, seed=1), store, ListScreen())
        chat.sessions = sessions
        return chat

    return make


def test_questions_and_commands(begin):
    chat = begin("A.", "B.")
    chat.screen.lines = ["a?", "", "  \n", "/undo", "b?", "/exit", "never"]
    chat.run()
    assert chat.screen.shown == "A.B."
    assert chat.screen.finished == 2
    assert chat.screen.told == ["taken back: a?"]
    assert chat.screen.lines == ["never"]
    assert [message["content"] for message in chat.dialogue.messages] == ["b?", "B."]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/help", ("/help", "")),
        ("  /set  temperature 0.7 ", ("/set", "temperature 0.7")),
        ("/?", ("/?", "")),
        ("/etc/passwd is a file", None),
        ("/* a comment */", None),
        ("/usr/bin", None),
        ("//help", None),
        ("/file a\nand more", None),
        ("what is /help", None),
        ("/", None),
    ],
)
def test_what_is_a_command(text, expected):
    assert split_command(text) == expected


def test_two_slashes_begin_a_message_with_one(begin):
    chat = begin()
    chat.line("//help me")
    chat.line("/usr/bin is what?")
    assert [message["content"] for message in chat.dialogue.messages[::2]] == ["/help me", "/usr/bin is what?"]


MISTAKES = {
    "/hepl": "there is no command /hepl; did you mean /help?",
    "/xyz": "there is no command /xyz; /help lists",
    "/file": "/file needs something: /file PATH",
    "/load": "/load needs something",
    "/undo 3": "/undo takes nothing behind it, not '3'",
    "/file gone.txt": "no such file: gone.txt",
    "/load nothing": "there is no conversation nothing; none has been kept yet",
    "/load a..*": "'a..*' cannot be the name of a session",
    "/save": "nothing has been said yet",
    "/retry": "nothing has been answered yet",
    "/undo": "nothing has been answered yet",
    "/set temprature 1": "there is no temprature to set; did you mean temperature?",
    "/set xyz 1": "there is no xyz to set; there are temperature, top_k",
    "/set temperature": "/set temperature needs a value",
    "/set temperature hot": "temperature must be a number of at least 0, not hot",
    "/set temperature -1": "temperature must be a number of at least 0, not -1",
    "/set temperature nan": "temperature must be a number of at least 0",
    "/set top_p 1.5": "top_p must be a number from 0 to 1, not 1.5",
    "/set top_k 1.5": "top_k must be a whole number",
    "/set max_new_tokens 0": "max_new_tokens must be a whole number of at least 1",
    "/set max_new_tokens much": "is not a number of tokens",
    "/set seed -1": "seed must be a whole number",
    "/set budget 4096": "budget cannot be changed while the model is in use",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_sentence_and_ends_nothing(line, begin):
    chat = begin()
    before = dict(chat.dialogue.options)
    assert chat.line(line)
    (told,) = chat.screen.wrong
    assert MISTAKES[line] in told
    assert "\n" not in told
    assert chat.dialogue.options == before
    assert chat.sessions[0].asked == []


def test_settings(begin):
    chat = begin(do_sample=False)
    for line in (
        "/set temperature 0.7",
        "/set top-k=20",
        "/set max_new_tokens 1K",
        "/set seed 5",
        "/set top_p default",
    ):
        chat.line(line)
    assert chat.screen.wrong == []
    assert chat.dialogue.options == {"temperature": 0.7, "top_k": 20, "max_new_tokens": 1024}
    assert chat.dialogue.seed == 5
    assert chat.screen.told[:2] == ["temperature = 0.7", "top_k = 20"]
    chat.line("/set temperature default")
    assert "temperature" not in chat.dialogue.options
    chat.screen.told.clear()
    chat.line("/set top_p 0.9")
    assert "nothing is drawn" in chat.screen.told[-1]
    chat.screen.told.clear()
    chat.line("/set")
    assert [line.partition(" = ")[0] for line in chat.screen.told][:2] == ["temperature", "top_k"]
    assert "seed = 5" in chat.screen.told


def test_help_lists_every_command(begin):
    chat = begin()
    chat.line("/help")
    for name in COMMANDS:
        assert any(line.startswith(name) for line in chat.screen.told)


def test_stats(begin):
    chat = begin("Hello.")
    chat.line("/stats")
    assert chat.screen.told == ["0 answers, 0 of 4,096 tokens of context used"]
    chat.line("a?")
    chat.line("/stats")
    assert chat.screen.told[1].startswith("1 answer, ")
    assert any("tokens per pass" in line for line in chat.screen.told)


def test_a_file_for_the_next_message(begin, tmp_path):
    (tmp_path / "a b.txt").write_text("text")
    chat = begin()
    chat.line(f"/file '{tmp_path / 'a b.txt'}'")
    assert chat.screen.told == ["a b.txt: 4 tokens, for the next message"]
    chat.line("What?")
    assert '<document name="a b.txt">\ntext\n</document>\n\nWhat?' in chat.sessions[0].asked[0][0]


def test_ctrl_c_where_nothing_is_typed_leaves_the_second_time(begin):
    chat = begin()
    chat.screen.lines = [KeyboardInterrupt(), "a?", KeyboardInterrupt(), KeyboardInterrupt(), "never"]
    chat.run()
    assert chat.screen.lines == ["never"]
    assert len([line for line in chat.screen.told if "Ctrl-C again" in line]) == 2


def test_ctrl_c_faster_than_the_prompt_comes_back(begin, monkeypatch):
    chat = begin()
    chat.screen.lines = [KeyboardInterrupt(), "never"]

    def say(line):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat.screen, "say", say)
    try:
        chat.run()
    except KeyboardInterrupt:
        pytest.fail("it was not heard")
    assert chat.screen.lines == ["never"]


def test_an_answer_that_is_stopped(begin):
    chat = begin(["Hel", "^C", "never"], ["^C"])
    chat.line("a?")
    assert chat.screen.shown == "Hel"
    assert "what was said is kept" in chat.screen.told[-1]
    chat.line("b?")
    assert "stopped before anything was said" in chat.screen.told[-1]
    assert chat.dialogue.exchanges == 1
    chat.line("/retry")
    assert chat.dialogue.exchanges == 2


@pytest.mark.parametrize("early", [True, False])
def test_a_real_ctrl_c_cancels_and_a_second_raises(early):
    calls = []
    before = signal.getsignal(signal.SIGINT)
    with Stopping() as stopping:
        if early:
            signal.raise_signal(signal.SIGINT)
            assert calls == []
        stopping.aim(lambda: calls.append(1))
        if not early:
            signal.raise_signal(signal.SIGINT)
        assert calls == [1]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_before_there_is_an_answer_to_cancel(begin):
    chat = begin(error=KeyboardInterrupt())
    assert chat.line("a?")
    assert chat.screen.told == ["stopped; /retry asks again"]
    assert chat.dialogue.messages == []
    chat.sessions[0].answers.append("A.")
    chat.line("/retry")
    assert chat.screen.shown == "A."


def test_memory_that_runs_out_in_an_answer(begin, folder):
    chat = begin(["Hel", "fail"], error=MemoryLimitError("memory ran out"))
    chat.store.name = "a"
    assert chat.line("a?")
    assert chat.screen.wrong == ["memory ran out"]
    assert chat.screen.finished == 1
    assert (folder / "a" / FILE).exists()


@pytest.mark.parametrize(("ending", "words"), [("length", "at its limit of 2 tokens"), ("stop", None)])
def test_why_an_answer_ended(ending, words, begin):
    chat = begin("ok", ending=ending)
    chat.line("a?")
    assert (words in chat.screen.told[-1]) if words else chat.screen.told == []


def test_a_full_conversation_says_so(begin):
    chat = begin("x" * 45, ending="length", positions=64)
    chat.line("a?")
    assert "the 64 tokens that fit" in chat.screen.told[-1]


def test_an_answer_of_nothing(begin):
    chat = begin([])
    chat.line("a?")
    assert chat.screen.told == ["the model said nothing; /retry asks again"]


def test_saving_and_loading(begin, folder):
    chat = begin("A.", "B.")
    chat.line("a?")
    chat.line("/save")
    assert "no name yet" in chat.screen.wrong[-1]
    chat.line("/load other")
    assert "has not been saved" in chat.screen.wrong[-1]
    chat.line("/save one")
    assert chat.screen.told[-1].startswith("saved as one in ")
    chat.line("b?")  # kept without being asked for, from now on
    assert names() == ["one"]
    other = begin("C.")
    other.line("/load one")
    assert other.screen.told == ["one: 2 answers, the last to: b?"]
    assert other.dialogue.messages == chat.dialogue.messages
    assert other.sessions[0].closed
    other.line("/undo")
    chat.line("/load one")
    assert chat.dialogue.exchanges == 1
    chat.line("/load two")
    assert chat.screen.wrong[-1] == "there is no conversation two; there are one"
    assert chat.store.name == "one"


def test_another_conversation_is_not_written_over(begin, folder):
    first, second = begin("A."), begin("B.")
    first.line("a?")
    first.line("/save one")
    second.line("b?")
    second.line("/save one")
    assert "there is a conversation one already" in second.screen.wrong[-1]
    first.line("/save one")
    first.line("/save two")
    assert len(first.screen.wrong) == 0
    assert names() == ["one", "two"]


def test_a_damaged_conversation_leaves_the_present_one(begin, folder):
    chat = begin("A.")
    chat.line("a?")
    chat.line("/save one")
    (folder / "two").mkdir()
    (folder / "two" / FILE).write_text("{")
    chat.line("/load two")
    assert "is damaged" in chat.screen.wrong[-1]
    assert chat.dialogue.exchanges == 1
    assert chat.store.name == "one"
    assert not chat.sessions[0].closed


def test_caches_that_cannot_be_used_are_read_anew(begin, folder, monkeypatch):
    chat = begin("A.", caches=True)
    saved = []
    monkeypatch.setattr(ScriptedSession, "save", lambda self, path: saved.append(path), raising=False)
    chat.line("a?")
    chat.line("/save one")
    assert saved == [folder / "one"]
    (folder / "one" / MANIFEST).write_text("{}")
    other = begin(caches=True)
    other.line("/load one")
    assert other.screen.told == ["one: 1 answer, the last to: a?"]
    assert other.dialogue.session is other.sessions[1]
    third = begin(caches=True)

    def refuse(path, progress):
        raise InputError("of another model")

    third.dialogue.engine.load_session = refuse
    third.line("/load one")
    assert "will be read anew: of another model" in third.screen.told[0]
    assert third.dialogue.exchanges == 1


def test_a_full_disk_ends_no_conversation(begin, folder, monkeypatch):
    chat = begin("A.", "B.")
    chat.store.name = "one"
    monkeypatch.setattr("offload_triforce.cli.chat_store.write_messages", _full)
    chat.line("a?")
    chat.line("b?")
    assert chat.screen.wrong == ["the disk is full"] * 2
    assert chat.dialogue.exchanges == 2


def _full(*_):
    raise InputError("the disk is full")


def test_a_new_conversation(begin, folder):
    chat = begin("A.", "B.")
    chat.line("a?")
    chat.line("/save one")
    chat.line("/clear")
    assert chat.dialogue.messages == []
    assert chat.store.name is None
    assert chat.sessions[0].closed
    assert chat.dialogue.session is chat.sessions[1]
    chat.line("b?")
    assert names() == ["one"]
