"""Memory in two phases: texts one after the other in one engine, exact, and each byte over the link counted once."""

from __future__ import annotations

import pytest
import torch

from offload_triforce import Settings, TriForce
from offload_triforce.errors import MemoryLimitError
from offload_triforce.model.adapter import attached
from offload_triforce.model.layout import probe
from offload_triforce.model.prefill import Prefill
from offload_triforce.planner import sizes
from offload_triforce.runtime.runtime import Runtime
from offload_triforce.runtime.session import Session
from offload_triforce.scheduler.late import LateTiles
from offload_triforce.scheduler.states import HostStates
from tests.scheduler.devices import EagerDevice, chaotic
from tests.tiny import greedy, prompt_ids, tiny_model

SETTINGS = Settings(chunk=4, sink=4, recent=8, tile=16, gamma=3, prefill_chunk=33, draft_cache=64, budget=80)


def settings(**changes):
    return Settings(**{**vars(SETTINGS), **changes})


LATE = {"resident": 0.7, "prefill_resident": 0.3}
WAYS = [LATE, {"resident": 1.0, "prefill_resident": 0.0}, {"hidden_states": "host"}, {**LATE, "hidden_states": "host"}]


@pytest.mark.parametrize(("family", "way"), [*(("llama", way) for way in WAYS), ("gemma3", WAYS[-1])], ids=str)
def test_texts_one_after_the_other_are_exact(family, way):
    """Short after long and long after short; the caches are those of the longest."""
    model = tiny_model(family)
    with TriForce(model, settings=settings(context=180, **way)) as engine:
        for seed, length in enumerate((120, 2, 160)):
            prompt = prompt_ids(length, seed)
            assert engine.generate(prompt, max_new_tokens=8, do_sample=False).token_ids == greedy(model, prompt, 8)


@pytest.mark.parametrize("way", WAYS[-1:], ids=str)
def test_the_same_draws_as_ever(way):
    """At a temperature, a seed gives the same text wherever the memory is."""
    model, prompt = tiny_model(), prompt_ids(100)
    answers = []
    for changes in ({}, way):
        with TriForce(model, settings=settings(**changes)) as engine:
            answers.append(engine.generate(prompt, max_new_tokens=10, do_sample=True, temperature=0.8, seed=3))
    assert answers[0].token_ids == answers[1].token_ids


def begun(runtime, tokens, seed=0):
    with attached(runtime.model), torch.no_grad():
        Session(runtime).begin(prompt_ids(tokens, seed)[0])


@pytest.fixture
def runtime():
    model = tiny_model()
    runtime = Runtime(model, probe(model), settings(**LATE), 300, device=EagerDevice())
    yield runtime
    runtime.close()


def late_in(plan, tiles):
    return sum(plan.is_late(layer, tile) for layer in range(plan.layers) for tile in range(tiles))


def test_late_tiles_are_there_between_two_prefills(runtime, monkeypatch):
    """Given up before a prompt is read, up when it has been read."""
    store = runtime.caches.full.stream.store
    seen = []

    run = Prefill.run

    def watched(*args):
        seen.append(len(store.late.places))
        run(*args)
        seen.append(len(store.late.places))

    monkeypatch.setattr(Prefill, "run", watched)
    for number, tokens in enumerate((250, 100)):
        begun(runtime, tokens, number)
        assert len(store.late.places) == late_in(runtime.plan, runtime.caches.full.tiles) > 0
    assert seen == [0, 0, 0, 0]


def test_nothing_of_a_prefill_is_held_when_they_come_up(monkeypatch):
    """Neither hidden states nor a layer's keys and values: that is the memory that they come up into."""
    made, alive = [], []
    new_empty = torch.Tensor.new_empty

    def watched(self, *shape, **how):
        tensor = new_empty(self, *shape, **how)
        made.append((tuple(tensor.shape), torch.multiprocessing.reductions.StorageWeakRef(tensor.untyped_storage())))
        return tensor

    bring_up = LateTiles.bring_up

    def up(self, host, tiles):
        alive.extend(shape for shape, storage in made if not storage.expired())
        bring_up(self, host, tiles)

    monkeypatch.setattr(torch.Tensor, "new_empty", watched)
    monkeypatch.setattr(LateTiles, "bring_up", up)
    model = tiny_model()
    runtime = Runtime(model, probe(model), settings(**LATE), 300)
    try:
        begun(runtime, 250)
    finally:
        runtime.close()
    shapes = {shape for shape, _ in made}
    assert (1, 250, 40) in shapes, "hidden states"
    assert (2, 1, 250, 12) in shapes, "keys and values of a layer"
    assert alive == []


def test_what_comes_up_is_an_item_of_its_own(runtime):
    model, prompt = runtime.model, prompt_ids(250)
    counts = {}
    for name, way in (("plain", {"resident": LATE["resident"]}), ("late", LATE)):
        with TriForce(model, settings=settings(context=300, gamma=0, link_gbps=1000.0, **way)) as engine:
            counts[name] = engine.generate(prompt, max_new_tokens=12, do_sample=False).stats
            plan, tiles = engine.runtime.plan, engine.runtime.caches.full.tiles
    late, plain = counts["late"], counts["plain"]
    moved = late_in(plan, tiles) * plan.tile_bytes
    assert (late.resident_link_bytes, plain.resident_link_bytes) == (moved, 0)
    assert late.prefill_link_bytes == plain.prefill_link_bytes + moved, "they have gone down before"
    assert late.link_bytes == plain.link_bytes, "passes fetch the same"
    assert late.as_dict()["resident_link_bytes"] == moved


def test_hidden_states_are_counted_with_the_prefill():
    model = tiny_model()
    prompt, counts = prompt_ids(200), []
    for where in ("device", "host"):
        with TriForce(model, settings=settings(hidden_states=where, link_gbps=1000.0)) as engine:
            counts.append(engine.generate(prompt, max_new_tokens=4, do_sample=False).stats.prefill_link_bytes)
    assert counts[1] - counts[0] == 2 * 3 * 199 * 40 * 4  # down and up, three layers, tokens, width, bytes


@pytest.mark.parametrize("tens", range(4))
def test_a_second_text_under_any_delays(tens):
    """On a device with late copies and poisoned buffers: two texts through every layer, and what is held at the end."""
    model = tiny_model()
    layout = probe(model)

    def held(device):
        way = {"hidden_states": "host", "resident": 0.8, "prefill_resident": 0.1}
        runtime = Runtime(model, layout, settings(**way), 130, device=device)
        try:
            begun(runtime, 120, 1)
            begun(runtime, 90, 2)
            return [runtime.caches.full.read(layer).clone() for layer in range(3)]
        finally:
            runtime.close()

    expected = held(EagerDevice())
    for seed in range(10 * tens, 10 * tens + 5):
        assert all(map(torch.equal, held(chaotic(seed, longest_ms=0.5)), expected))


class Stop(Exception):
    pass


def test_a_prompt_that_is_given_up_leaves_the_next_one_right():
    model = tiny_model()
    runtime = Runtime(model, probe(model), settings(hidden_states="host", **LATE), 300)
    try:
        for steps in (1, 5, 14):

            def stop(done, total, steps=steps):
                if done == steps:
                    raise Stop

            with pytest.raises(Stop), attached(model), torch.no_grad():
                Session(runtime).begin(prompt_ids(250)[0], stop)
            assert isinstance(runtime.states, HostStates)
            assert runtime.states._slots is None
            begun(runtime, 200, 4)
            kept = [runtime.caches.full.read(layer) for layer in range(3)]
            other = Runtime(model, probe(model), settings(), 300)
            begun(other, 200, 4)
            assert all(map(torch.equal, kept, [other.caches.full.read(layer) for layer in range(3)]))
            other.close()
    finally:
        runtime.close()


@pytest.mark.parametrize("family", ["llama", "qwen3-moe", "gemma2", "gemma3", "phi3-longrope"])
def test_hidden_states_of_other_families_fit(family):
    """Their width and dtype are what was planned for."""
    model = tiny_model(family).to(torch.bfloat16)
    with TriForce(model, settings=settings(hidden_states="host")) as engine:
        other = TriForce(model, settings=settings())
        prompt = prompt_ids(70)
        answers = [each.generate(prompt, max_new_tokens=3, do_sample=False).token_ids for each in (engine, other)]
        assert answers[0] == answers[1]
        other.close()


def test_what_does_not_fit_in_either_phase_is_refused_before(monkeypatch):
    model = tiny_model()
    layout = probe(model)
    given = settings(resident=1.0, prefill_resident=0.0, hidden_states="host")
    plan = sizes.make_plan(layout, given, 3000)
    needs = sizes.work_out(model, layout, given, sizes.make_shape(given, 3000), plan, 3000)
    held = sum(needs.caches.values())
    assert needs.device == held + sum(needs.decoding.values()) > held + sum(needs.prefill.values())
    monkeypatch.setattr(sizes, "free_on_host", lambda: needs.device + needs.host_bytes)
    Runtime(model, layout, given, 3000).close()
    monkeypatch.setattr(sizes, "free_on_host", lambda: needs.device + needs.host_bytes - 1)
    with pytest.raises(MemoryLimitError, match=r"0\.0 GB too little"):
        Runtime(model, layout, given, 3000)
