"""Teams of threads that OpenMP keeps: none is left where nobody computes."""

import sys
import threading
import time
from functools import partial

import psutil
import pytest
import torch

from offload_triforce import TriForce
from offload_triforce.machine import teams
from offload_triforce.machine.teams import release_team
from tests.tiny import prompt_ids, tiny_model


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def threads(expected=None):
    """How many this process has, once they are as many as expected: those of a team end some time after it."""
    end = time.monotonic() + 5
    while (found := psutil.Process().num_threads()) != expected and time.monotonic() < end:
        if expected is None and time.monotonic() > end - 4.5:
            break
        time.sleep(0.01)
    return found


def compute():
    torch.ones(1_000_000).add_(1)


@pytest.mark.skipif(not teams._pauses(), reason="this torch does not use GCC's OpenMP")
def test_a_team_is_let_go_and_comes_back(three_threads):
    release_team()
    alone = threads()
    for _ in range(2):
        compute()
        assert threads(alone + 2) == alone + 2
        release_team()
        assert threads(alone) == alone
    release_team()  # there is none


@pytest.mark.skipif(not teams._pauses(), reason="this torch does not use GCC's OpenMP")
def test_only_this_threads_own(three_threads):
    computed, released = threading.Event(), threading.Event()

    def other():
        compute()
        computed.set()
        released.wait(30)
        compute()

    release_team()
    alone = threads()
    thread = threading.Thread(target=other)
    thread.start()
    computed.wait(30)
    release_team()
    assert threads(alone + 3) == alone + 3
    released.set()
    thread.join()
    assert threads(alone) == alone


def test_where_there_is_no_such_library(monkeypatch, tmp_path):
    monkeypatch.setattr(teams, "_MAPS", tmp_path / "gone")
    assert teams._pauses.__wrapped__() == []
    (tmp_path / "maps").write_text("7f00-7f01 r-xp 0 0:0 1  /lib/libc.so.6\n")
    monkeypatch.setattr(teams, "_MAPS", tmp_path / "maps")
    assert teams._pauses.__wrapped__() == []


def test_an_engine_lets_it_go_when_it_has_been_made_and_after_each_answer(monkeypatch):
    """By the thread that has decoded."""
    calls = []
    for module in ("offload_triforce.engine", "offload_triforce.runtime.decoding"):
        monkeypatch.setattr(sys.modules[module], "release_team", lambda: calls.append(threading.current_thread().name))
    with TriForce(tiny_model("llama"), draft="ngram") as engine:
        assert calls == ["MainThread"]
        ask = partial(engine.generate, prompt_ids(20), max_new_tokens=4)
        thread = threading.Thread(target=ask, name="X")
        thread.start()
        thread.join()
        assert calls == ["MainThread", "X"]
        ask()
    assert calls == ["MainThread", "X", "MainThread"]
