"""What a callback asks of engines: it gets an answer or a sentence, and never waits for ever."""

import threading

import pytest
from transformers.generation.streamers import BaseStreamer

from offload_triforce import BusyError, InputError, TriForce, stateless
from offload_triforce.generation.turn import Answer
from offload_triforce.runtime import runtime as runtime_module
from tests.generation.turns import GREEDY, NEW, PROMPT, SMALL
from tests.model.test_lock import in_thread, until

pytestmark = pytest.mark.usefixtures("one_thread")
CANNOT_WAIT = (
    "this engine is in the middle of an answer or a save, and a callback cannot wait for what it is called by; ask "
    "when that has returned"
)
CANNOT_CLOSE = "this engine is in the middle of an answer or a save, and cannot be closed by one of its callbacks"
FEW = {"max_new_tokens": 3, "do_sample": False}


class Asking:
    """A callback that asks for something once, in its own thread; ``heard``: what it got for it."""

    def __init__(self, work):
        self.work, self.heard = work, []

    def __call__(self, *_):
        if not self.heard:
            self.heard.append("nothing yet")
            try:
                self.heard.append(self.work())
            except Exception as error:
                self.heard.append(error)


def within(seconds, work):
    """What it returns; fails instead of waiting for ever."""
    thread, results = in_thread(work)
    thread.join(seconds)
    assert not thread.is_alive(), "a deadlock"
    return results


def ask_for_everything(engine, folder):
    """All that takes an engine's turn: what each was told."""
    session, heard = engine.session(), {}
    for name, work in {
        "generate": lambda: engine.generate(PROMPT, **FEW),
        "stream": lambda: engine.stream(PROMPT, **FEW),
        "session": lambda: session.generate(PROMPT, **FEW),
        "save": lambda: session.save(folder),
        "make room": lambda: session.make_room(100),
        "close session": session.close,
        "load": lambda: engine.load_session(folder),
        "close": engine.close,
    }.items():
        with pytest.raises(BusyError) as error:
            work()
        heard[name] = str(error.value)
    return heard


@pytest.mark.parametrize("place", ["prefill", "processor", "saving"])
def test_no_callback_waits_for_what_it_is_called_by(model, expected, tmp_path, place):
    """And what it is called by goes on as if nothing had been asked."""
    with TriForce(model, draft="ngram", **SMALL) as engine:
        session = engine.session()
        assert session.generate(PROMPT, **GREEDY).token_ids == expected
        session.save(tmp_path / "old")
        asking = Asking(lambda: ask_for_everything(engine, tmp_path / "old"))
        processor = stateless(lambda ids, scores: [asking(), scores][1])
        work = {
            "prefill": lambda: engine.generate(PROMPT, **GREEDY, progress=asking).token_ids,
            "processor": lambda: engine.generate(PROMPT, **GREEDY, logits_processor=[processor]).token_ids,
            "saving": lambda: session.save(tmp_path / "new", asking).tokens,
        }[place]
        assert within(60, work) == [PROMPT.shape[1] + NEW - 1 if place == "saving" else expected]
        heard = asking.heard[1]
        assert heard.pop("close") == CANNOT_CLOSE
        assert set(heard.values()) == {CANNOT_WAIT}
        if place == "saving":
            with engine.load_session(tmp_path / "new") as loaded:
                assert loaded.generate(PROMPT, **GREEDY).token_ids == expected
        else:
            assert engine.generate(PROMPT, **GREEDY, wait=False).token_ids == expected


class Streamer(BaseStreamer):
    """Asks when the first token has come."""

    def __init__(self, asking):
        self._asking, self._seen = asking, 0

    def put(self, value):
        self._seen += 1
        if self._seen > 1:
            self._asking()

    def end(self):
        pass


def test_what_a_streamer_asks_for_ends_the_answer_that_it_belongs_to(engine, expected):
    """It is called between two passes, by the thread that reads: as if that had asked."""
    asking = Asking(lambda: engine.generate(PROMPT, **GREEDY).token_ids)

    def work():
        with pytest.raises(InputError, match="given up"):
            engine.generate(PROMPT, **GREEDY, streamer=Streamer(asking))

    within(60, work)
    assert asking.heard[1] == expected


def test_a_handler_that_strikes_while_its_thread_waits(engine, expected):
    """As a signal's may: its thread would get the turn that it waits for, and not come to use it."""
    stream = engine.stream(PROMPT, **GREEDY)
    next(stream._tokens)
    asking = Asking(lambda: engine.generate(PROMPT, **GREEDY))

    class Struck(Answer):
        def listen(self):
            asking()
            super().listen()

    answer = Struck()

    def waits():
        engine._turns.take(answer, wait=True)
        engine._turns.release(answer)
        return "waited"

    thread, results = in_thread(waits)
    until(lambda: len(asking.heard) == 2)
    stream.close()
    thread.join(20)
    assert not thread.is_alive(), "a deadlock"
    assert results == ["waited"]
    assert str(asking.heard[1]) == CANNOT_WAIT


def test_who_pins_memory_is_waited_for(engine, monkeypatch):
    """The callback is called on the thread that pins, and a prefill waits for that."""
    told = []

    class Store(runtime_module.TileStore):
        def __init__(self, plan, dtype, device, pinning, free):
            super().__init__(plan, dtype, device, free=free)
            told.append(pinning)

    monkeypatch.setattr(runtime_module, "TileStore", Store)
    asking, heard = Asking(lambda: engine.generate(PROMPT, **FEW)), []

    def progress(*_):  # of the prefill, which waits for some memory to be pinned
        if not heard:
            heard.extend(within(20, lambda: told[0](1, 2)) or ["nothing"])

    engine.generate(PROMPT, **FEW, progress=progress, pinning=asking)
    assert str(asking.heard[1]) == CANNOT_WAIT


def test_two_saves_whose_callbacks_ask_each_others_engine(model, engine, tmp_path):
    """Two threads that each keep an engine, and want the other's."""
    with TriForce(model, draft="ngram", **SMALL) as other:
        engines, gate, asked = [engine, other], threading.Barrier(2), []
        sessions = [each.session() for each in engines]
        for session in sessions:
            session.generate(PROMPT, **FEW)

        def save(number):
            def callback(*_):
                if len(asked) < 2 and number not in [n for n, _ in asked]:
                    gate.wait(20)
                    with pytest.raises(BusyError) as error:
                        engines[1 - number].generate(PROMPT, **FEW)
                    asked.append((number, str(error.value)))
                    gate.wait(20)

            sessions[number].save(tmp_path / str(number), callback)

        threads = [in_thread(lambda number=number: save(number))[0] for number in (0, 1)]
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads), "a deadlock"
    assert sorted(asked) == [(0, CANNOT_WAIT), (1, CANNOT_WAIT)]


def test_a_save_may_run_another_engine(model, engine, expected, tmp_path):
    with TriForce(model, draft="ngram", **SMALL) as other, engine.session() as session:
        session.generate(PROMPT, **FEW)
        asking = Asking(lambda: other.generate(PROMPT, **FEW).token_ids)
        session.save(tmp_path / "kept", asking)
    assert asking.heard[1] == expected[:3]


def test_a_callback_may_run_another_engine(model, engine, expected):
    seen = []
    with TriForce(model, draft="ngram", **SMALL) as other:
        few = {"max_new_tokens": 3, "do_sample": False}
        progress = lambda done, total: seen.append(other.generate(PROMPT, **few).token_ids)  # noqa: E731
        assert engine.generate(PROMPT, **GREEDY, progress=progress).token_ids == expected
    assert seen == [expected[:3]] * 9
