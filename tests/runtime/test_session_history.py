"""Whatever was asked, cut, switched, saved, loaded or interrupted before, an answer is that of a fresh engine."""

from __future__ import annotations

import contextlib
import gc
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from offload_triforce import InputError, TriForce
from offload_triforce.runtime.session_files import verify_text
from tests.runtime.desk import FAMILIES, HOW, KEEPS, Desk, draw_ids, fresh, model_of

pytestmark = pytest.mark.usefixtures("small_groups")
OWNED = st.integers(0, 1)  # sessions that can be saved: the third text belongs to nobody


class Histories(RuleBasedStateMachine):
    """A desk, and what of it lies on disk: ``saved`` has the ids of each session there."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.saved: dict[int, list[int]] = {}
        self.desk = None

    @initialize(family=st.sampled_from(FAMILIES), draft=st.sampled_from(["ngram", "self", "none"]))
    def begin(self, family, draft):
        plain = {"gamma": 0, "draft_tokens": None} if draft == "none" else {}
        self.make = lambda: TriForce(model_of(family), draft=draft, **{**HOW, **plain})
        self.desk = Desk(family, self.make())

    @rule(
        which=st.integers(0, 2),
        keep=st.sampled_from(list(KEEPS)),
        more=st.sampled_from([0, 1, 5, 30, 90]),
        new=st.sampled_from([1, 4, 15]),
        temperature=st.sampled_from([0.0, 0.9]),
    )
    def ask(self, which, keep, more, new, temperature):
        self.desk.ask(which, KEEPS[keep], more, new, temperature)

    @rule(which=st.integers(0, 2), more=st.sampled_from([3, 60]), after=st.integers(0, 30))
    def interrupt(self, which, more, after):
        self.desk.interrupt(which, more, after)

    @rule(which=OWNED, after=st.one_of(st.none(), st.none(), st.integers(1, 9)))
    def save(self, which, after):
        """``after`` so many files it is interrupted, if it has that many: what was there before is there still."""
        session, told = self.desk.sessions[which], []

        def stop(done, total):
            told.append(done)
            if len(told) == after:
                raise KeyboardInterrupt

        held = session.tokens.tolist()
        if not held and not session.part_tokens:
            with pytest.raises(InputError, match="nothing to save"):
                session.save(self.place(which))
            return
        with contextlib.suppress(KeyboardInterrupt):
            assert session.save(self.place(which), stop).tokens == len(held)
            self.saved[which] = held
        assert self.place(which).exists() == (which in self.saved)
        if which in self.saved:
            assert verify_text(self.place(which)).length == len(self.saved[which])

    @precondition(lambda self: self.saved)
    @rule(which=OWNED)
    def load(self, which):
        """In place of what the session holds now."""
        if which in self.saved:
            self.desk.sessions[which].close()
            self.desk.sessions[which] = self.loaded(which)

    @precondition(lambda self: self.saved)
    @rule()
    def another_day(self):
        """A new engine, which has what was saved, and nothing else."""
        self.desk.engine.close()
        self.desk.engine = self.make()
        self.desk.sessions = [
            self.loaded(which) if which in self.saved else self.desk.engine.session() for which in (0, 1)
        ] + [None]

    def place(self, which):
        return Path(self.folder.name) / str(which)

    def loaded(self, which):
        """The text goes on from what was saved, be it in part, whose newest token is not read yet."""
        session = self.desk.engine.load_session(self.place(which))
        assert session.tokens.tolist() == self.saved[which]
        part = session.text.parked.part
        self.desk.texts[which] = (*self.saved[which], *([] if part is None else part.tokens.tolist()), 5)
        return session

    def teardown(self):
        if self.desk is not None:
            self.desk.engine.close()
        self.folder.cleanup()


def test_any_history_is_a_fresh_engine():
    run_state_machine_as_test(Histories, settings=settings(deadline=None, max_examples=10, stateful_step_count=8))


def test_two_sessions_that_are_saved_in_turns_are_each_alone(tmp_path):
    """On disk too: neither takes anything of the other's, and every turn goes on from all that was held."""
    with TriForce(model_of("qwen3.5"), **HOW) as engine:
        desk = Desk("qwen3.5", engine)
        for turn in range(3):
            for which in (0, 1):
                held = len(desk.sessions[which].tokens)
                assert desk.ask(which, KEEPS["all"], 20, 4, 0.0).stats.reused_tokens == held
                desk.sessions[which].save(tmp_path / str(which))
                if turn:
                    desk.sessions[which].close()
                    desk.sessions[which] = engine.load_session(tmp_path / str(which))


def live_bytes():
    """Of all tensors that are alive."""
    gc.collect()
    return sum(each.nbytes for each in gc.get_objects() if type(each) is torch.Tensor)


def talk(engine, turns, measure):
    """Three texts, turn about; each grows for some turns, and goes back then. ``measure`` is told of each turn.

    After each 15 turns, all of them are as long as they were 15 turns before.
    """
    sessions, texts = [engine.session() for _ in range(3)], [draw_ids(i, 30) for i in range(3)]
    for turn in range(turns):
        which = turn % 3
        prompt = texts[which] + draw_ids(turn, 40)
        answer = engine.generate(list(prompt), session=sessions[which], max_new_tokens=4, seed=turn)
        texts[which] = prompt[:30] if len(prompt) > 230 else (*prompt, *answer.token_ids)
        measure(turn + 1)


def test_many_turns_take_no_more_memory():
    """Counted in tensors that are alive: what the C library keeps is its own affair."""
    seen = {}
    with TriForce(model_of("gemma3"), **HOW) as engine:
        talk(engine, 45, lambda turn: seen.update({turn: live_bytes()} if turn in (15, 45) else {}))
    assert seen[45] <= 1.1 * seen[15]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", FAMILIES)
def test_three_hundred_turns_take_no_more_memory(family):
    """Of the whole process, too: what is resident after 105 turns suffices for the rest."""
    tensors, resident = {}, {}

    def measure(turn):
        if turn in (45, 105, 210, 300):
            fresh.cache_clear()
            tensors[turn], resident[turn] = live_bytes(), resident_bytes()

    with TriForce(model_of(family), **HOW) as engine:
        talk(engine, 300, measure)
    print(family, {turn: f"{size / 1e6:.1f} MB" for turn, size in resident.items()})
    assert tensors[300] <= 1.1 * tensors[105]
    assert resident[300] <= resident[105] + 8 * 2**20


def resident_bytes():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmRSS:")[1].split()[0])
