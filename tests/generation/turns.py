"""Several threads that want answers of one engine or one model, for the tests of turns."""

from __future__ import annotations

import threading

from offload_triforce import InputError
from offload_triforce.model.lock import locks_of
from tests.model.test_lock import in_thread, raise_in_thread
from tests.tiny import greedy, prompt_ids

PROMPT, NEW = prompt_ids(70), 24
GREEDY = {"max_new_tokens": NEW, "do_sample": False}
SMALL = {"budget": 48, "gamma": 4, "gamma1": 3, "chunk": 4, "sink": 4, "recent": 16, "tile": 16, "draft_cache": 64}
SMALL |= {"prefill_chunk": 32}


def all_at_once(*works):
    """Run all of them at the same time, each on a thread of its own: what each returned, or the error."""
    results, gate = [None] * len(works), threading.Barrier(len(works))

    def work(number):
        gate.wait(20)
        try:
            results[number] = works[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert not any(thread.is_alive() for thread in threads), "a deadlock"
    return results


def assert_untouched(model, expected):
    """The model as it was, and nobody's lock is left."""
    assert model.config._attn_implementation == vars(model.config)["_attn_implementation_internal"] == "sdpa"
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(lock.held() for lock in locks_of([model]))
    assert greedy(model, PROMPT, NEW) == expected
    raise_in_thread(lambda: assert_equal(greedy(model, PROMPT, 10), expected[:10]))


def assert_equal(one, other):
    assert one == other


class Paused:
    """An answer of another thread, which has read one piece of it and then waits for ``go``."""

    def __init__(self, engine):
        self.go, self.begun = threading.Event(), threading.Event()
        self.tokens, self.error = [], None
        self.thread, _ = in_thread(lambda: self._read(engine))
        assert self.begun.wait(20)

    def _read(self, engine):
        try:
            with engine.stream(PROMPT, **GREEDY) as stream:
                for new in stream._tokens:
                    self.tokens += new
                    self.begun.set()
                    self.go.wait(20)
        except InputError as error:
            self.error = error

    def end(self):
        self.go.set()
        self.thread.join(20)
        assert not self.thread.is_alive()
