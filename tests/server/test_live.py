"""What the page is told of the runtime: the engine's own counts, taken while it works."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("fastapi", reason="needs fastapi: pip install 'offload-triforce[serve]'")
pytest.importorskip("httpx", reason="fastapi's test client needs httpx")

from fastapi import FastAPI
from fastapi.testclient import TestClient

from offload_triforce import TriForce
from offload_triforce.machine.hardware import Measured
from offload_triforce.scheduler.device import COMPUTE, D2H, DRAFT, H2D, VERIFY
from offload_triforce.scheduler.trace import Span
from offload_triforce.server import live
from offload_triforce.server.line import Line
from offload_triforce.server.live import Board, describe_answer, describe_link, describe_pass, live_router, merge
from offload_triforce.server.metrics import Metrics
from offload_triforce.speculation.stats import DecodeStats
from tests.byte_tokenizer import byte_tokenizer
from tests.tiny import prompt_ids, tiny_model

SMALL = {"budget": 48, "chunk": 4, "sink": 4, "recent": 16, "tile": 16, "draft_cache": 64, "gamma": 8}
ASKED = {"max_new_tokens": 30, "do_sample": False}


@pytest.fixture
def engine():
    with TriForce(tiny_model(calm=True), byte_tokenizer(), draft="self", link_gbps=0.5, **SMALL) as engine:
        yield engine


@pytest.fixture
def state(engine):
    return SimpleNamespace(engine=engine, stats=None, busy=False, waiting=0)


@pytest.fixture
def ask(state):
    app = FastAPI()
    app.include_router(live_router(state))
    client = TestClient(app)

    def ask(timeline=0):
        response = client.get(f"/page/live?timeline={timeline}")
        assert response.status_code == 200
        return response.json()

    return ask


def test_before_the_first_answer(ask):
    found = ask(timeline=1)
    assert found["answer"] is found["memory"] is found["pass"] is None
    assert found["link"] == {"limit_gbps": 0.5, "source": "that of the emulated link"}
    assert (found["busy"], found["waiting"]) == (False, 0)


def test_while_an_answer_comes_and_after_it(ask, state, engine):
    stream = engine.stream(prompt_ids(150), **ASKED)
    state.stats, state.busy, state.waiting = stream.stats, True, 2
    assert "hidden states" in ask()["memory"]["device"], "the prompt is still to be read"
    next(stream)
    early = ask()
    assert (early["busy"], early["waiting"]) == (True, 2)
    assert 0 < early["answer"]["new_tokens"] < 30
    for _ in stream:
        pass
    state.busy = False
    late, stats = ask(), stream.stats
    assert late["answer"]["new_tokens"] == stats.new_tokens == 30
    assert late["answer"]["passes"] == stats.passes
    assert late["answer"]["tokens_per_pass"] == pytest.approx(30 / stats.passes)
    assert late["answer"]["acceptance"] == {"draft": stats.draft.rate, "retrieval": stats.retrieval.rate}
    assert late["answer"]["link_gbps"] == pytest.approx(stats.link_bytes / stats.decode_s / 1e9)
    assert late["answer"]["link_gbps"] <= 0.5, "no more than the link carries"
    again = engine.stream(prompt_ids(150), **ASKED)
    list(again)
    state.stats = again.stats
    assert ask()["answer"]["reused_tokens"] == again.stats.reused_tokens > 0


def test_memory_is_what_the_runtime_says(ask, state, engine):
    state.stats = engine.generate(prompt_ids(150), **ASKED).stats
    memory, needs = ask()["memory"], engine.runtime.needs
    weights = sum(tensor.nbytes for tensor in engine.model.parameters())
    assert memory["host"] == needs.host
    assert memory["device"].pop("weights") >= weights
    assert memory["device"] == needs.caches | needs.decoding
    assert memory["context"] == engine.runtime.context


def test_parked_sessions_are_counted(ask, state, engine):
    """Those in host memory, by what their tensors take; the one in the caches is in those."""
    metrics = Metrics()
    metrics.watch(Line(1), engine)
    session = engine.session()
    session.generate(prompt_ids(60), max_new_tokens=2)
    assert engine.parked_bytes == 0
    assert "parked sessions" not in ask()["memory"]["host"]
    engine.generate(prompt_ids(60, seed=1), max_new_tokens=2)
    parked = engine.parked_bytes
    assert parked >= 60 * engine.runtime.full_kv_bytes(1)
    assert ask()["memory"]["host"]["parked sessions"] == parked
    assert f"offload_triforce_parked_session_bytes {float(parked)}" in metrics.text().decode()
    session.close()
    assert engine.parked_bytes == 0


def test_the_last_pass_is_one_pass(ask, state, engine):
    engine.generate(prompt_ids(150), **ASKED)
    assert ask(timeline=1)["pass"] is None, "nobody had looked"
    state.stats = engine.generate(prompt_ids(150, seed=1), **ASKED).stats
    found = ask(timeline=1)["pass"]
    tracks, plan = found["tracks"], engine.runtime.plan
    assert {VERIFY, COMPUTE, H2D} <= set(tracks) <= {VERIFY, COMPUTE, H2D, D2H, DRAFT}
    assert tracks[H2D]["bytes"] == plan.layers * engine.runtime.caches.full.tiles * plan.tile_bytes
    assert len(tracks[VERIFY]["spans"]) == 1
    times = [time for track in tracks.values() for span in track["spans"] for time in span[:2]]
    assert min(times) == 0
    assert max(times) == pytest.approx(found["ms"], abs=0.002)
    assert all(0 < track["busy_ms"] <= found["ms"] + 0.002 for track in tracks.values())


def test_nothing_is_traced_unless_it_is_asked_for(ask, state, engine):
    state.stats = engine.generate(prompt_ids(150), **ASKED).stats
    assert ask()["pass"] is None
    assert engine.runtime.device.trace is None


def test_looking_changes_no_token(ask, state, engine):
    plain = engine.generate(prompt_ids(150), **ASKED).token_ids
    engine.close()
    stream = engine.stream(prompt_ids(150), **ASKED)
    state.stats, state.busy = stream.stats, True
    for _ in stream:
        ask(timeline=1)
    assert stream.result.token_ids == plain


def test_caches_are_given_back_although_somebody_looks(state, engine):
    board = Board(state)
    engine.generate(prompt_ids(150), **ASKED)
    board.snapshot(timeline=True)
    gone = weakref.ref(engine.runtime)
    engine.close()
    gc.collect()
    assert gone() is None
    assert board.snapshot(timeline=True)["memory"] is None


def test_speed_without_anything_on_the_link():
    assert describe_answer(DecodeStats())["link_gbps"] is None
    assert describe_answer(DecodeStats(link_bytes=4_000_000_000, decode_s=2.0))["link_gbps"] == 2.0
    assert describe_pass([]) is None


def test_a_pass_of_thousands_of_tiles_is_a_small_answer():
    spans = [Span(H2D, "", i * 1e-3, i * 1e-3 + 0.999e-3, 10) for i in range(8000)]
    spans.insert(4000, Span(COMPUTE, "", 3.9995, 3.9996))
    found = describe_pass(spans)
    assert found["ms"] == pytest.approx(8000, abs=0.01)
    assert found["tracks"][H2D]["bytes"] == 80_000
    assert found["tracks"][H2D]["busy_ms"] == pytest.approx(8000 * 0.999)
    assert found["tracks"][H2D]["spans"] == [[0.0, pytest.approx(8000, abs=0.01), 0.999]]
    assert merge([(0, 1), (3, 4), (5, 6), (5.5, 5.6)], 1) == [[0, 1, 1.0], [3, 6, 0.667]]


def test_where_the_limit_is_known_from(monkeypatch):
    assert describe_link(torch.device("cpu"), None)["limit_gbps"] is None
    machine = SimpleNamespace(name="RTX 4090", link_gbps=25.2)
    monkeypatch.setattr(live, "this_machine", lambda device: machine)
    for measured, words in ((None, "assumed"), (Measured("RTX 4090", 1, 25.2, 25.0, 900.0, "today"), "measured here")):
        monkeypatch.setattr(live, "read_measured", lambda measured=measured: measured)
        live._real_link.cache_clear()
        found = describe_link(torch.device("cuda"), None)
        assert found["limit_gbps"] == 25.2
        assert words in found["source"]
    live._real_link.cache_clear()
