"""A cache that lies coded: the same tokens as from a raw one, fewer bytes, and sessions that both can go on with."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from offload_triforce import Settings, TriForce
from offload_triforce.errors import InputError, MemoryLimitError
from offload_triforce.kernels import wire_format
from offload_triforce.planner.sizes import make_plan
from offload_triforce.runtime import runtime
from tests.tiny import prompt_ids, tiny_model
from tests.usual import sampled

# All layers full, sliding ones among them, recurrent ones, one KV head for several queries.
FAMILIES = ("llama", "gemma3", "qwen2-sliding", "qwen3.5", "qwen2")
SMALL = {"budget": 64, "sink": 8, "recent": 16, "tile": 32, "prefill_chunk": 100, "gamma": 6, "draft": "ngram"}
SMALL |= {"adaptive": False, "overlap": False}  # passes of the same tokens: in 16 bits, other blocks round otherwise
PROMPT, NEW = prompt_ids(170), 32


@cache
def model_of(family, dtype=torch.bfloat16):
    return tiny_model(family, seed=1, calm=True).to(dtype)


def answer(family, wire, prompt=PROMPT, dtype=torch.bfloat16, temperature=0.0, **settings):
    with TriForce(model_of(family, dtype), **{**SMALL, "link_gbps": 1000.0, **settings}, wire=wire) as engine:
        result = engine.generate(prompt, max_new_tokens=NEW, temperature=temperature, seed=3)
        store = engine.runtime.caches.full.stream.store
        lies = {store.source(layer, 0).dtype for layer in range(store.plan.layers)}
        return result, lies


@pytest.mark.parametrize(("family", "temperature"), sampled(FAMILIES, [0.0, 0.8], share=2))
def test_the_same_tokens_raw_and_coded(family, temperature):
    raw, raw_lies = answer(family, "raw", temperature=temperature)
    coded, coded_lies = answer(family, "coded", temperature=temperature)
    assert coded.token_ids == raw.token_ids
    assert (raw_lies, coded_lies) == ({torch.bfloat16}, {torch.uint8})
    assert coded.stats.passes == raw.stats.passes


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_on_cuda(family, temperature):
    """And by default coded: that is what "auto" means there."""
    found = []
    for wire in ("raw", "coded", "auto"):
        model = tiny_model(family, seed=1, calm=True).to("cuda", torch.bfloat16)
        with TriForce(model, **{**SMALL, "tile": 128, "resident": 0.3}, wire=wire) as engine:
            result = engine.generate(prompt_ids(700), max_new_tokens=200, temperature=temperature, seed=3)
            found.append(result.token_ids)
            ratio = engine.runtime.caches.full.stream.plan.wire_ratio
        assert ratio == 1.0 if wire == "raw" else ratio > 1.2
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    "settings",
    [
        {"resident": 0.4},
        {"resident": 0.7, "prefill_resident": 0.2},
        {"ring": 1, "hidden_states": "host"},
        {"gamma": 0},
        {"dtype": torch.float16},
    ],
    ids=str,
)
def test_so_it_is_with_other_settings(settings):
    assert answer("llama", "coded", **settings)[0].token_ids == answer("llama", "raw", **settings)[0].token_ids


@pytest.mark.parametrize("settings", [{}, {"resident": 0.7, "prefill_resident": 0.2}], ids=str)
def test_so_it_is_where_nothing_fits(monkeypatch, settings):
    """Every tile turns out not to fit, and goes raw: while the prompt is read, and while it is decoded."""
    raw = answer("llama", "raw", **settings)[0]
    monkeypatch.setattr(wire_format, "ROOM", 0.0)
    coded, lies = answer("llama", "coded", **settings)
    assert coded.token_ids == raw.token_ids
    assert lies <= {torch.bfloat16}


def test_link_bytes_fall_by_the_rate():
    """Of tiles that are large enough for their headers not to count."""
    changes = {"tile": 128, "gamma": 0, "prompt": prompt_ids(700)}
    raw, coded = (answer("qwen2", wire, **changes)[0].stats for wire in ("raw", "coded"))
    assert raw.raw_link_bytes == raw.link_bytes
    assert raw.wire_ratio == 1.0
    assert coded.raw_link_bytes == raw.link_bytes
    plan = make_plan(*_planned("qwen2", tile=128, wire="coded"))
    assert plan.wire_ratio > 1.3
    assert coded.wire_ratio == pytest.approx(plan.wire_ratio)
    assert coded.link_bytes * plan.wire_ratio == pytest.approx(raw.link_bytes)
    assert coded.as_dict()["wire_ratio"] == coded.wire_ratio


def _planned(family, dtype=torch.bfloat16, **settings):
    from offload_triforce.model.layout import probe

    return probe(model_of(family, dtype)), Settings(**{**{k: SMALL[k] for k in ("sink", "tile")}, **settings}), 1000


def test_auto_is_coded_where_there_is_a_link_and_it_pays():
    def ratio(dtype=torch.bfloat16, **settings):
        return make_plan(*_planned("qwen2", dtype, **{"tile": 128, **settings})).wire_ratio

    assert ratio() == 1.0, "nothing crosses a link on the bare CPU"
    assert ratio(link_gbps=1.0) > 1.3
    assert ratio(link_gbps=1.0, wire="raw") == 1.0
    assert ratio(torch.float32, link_gbps=1.0) == 1.0
    assert ratio(link_gbps=1.0, tile=100, chunk=4, sink=4) == 1.0, "tiles are coded 8 tokens at a time"
    assert ratio(torch.float16, link_gbps=1.0) > 1.1


@pytest.mark.parametrize(
    ("dtype", "settings", "words"),
    [
        (torch.float32, {}, "wire='coded' is for keys and values in bfloat16 or float16, and this model .* float32"),
        (torch.bfloat16, {"tile": 100, "chunk": 4, "sink": 4}, "multiple of 8 tokens, not 100; 104 would do"),
    ],
)
def test_refused_in_a_sentence(dtype, settings, words):
    with pytest.raises(InputError, match=words), TriForce(model_of("llama", dtype), wire="coded", **settings) as engine:
        engine.generate(PROMPT, max_new_tokens=2)


@pytest.mark.parametrize(("saved", "loaded"), [("coded", "raw"), ("raw", "coded"), ("coded", "coded")])
@pytest.mark.parametrize("family", ["llama", "qwen3.5"])
def test_sessions_go_on_either_way(family, saved, loaded, tmp_path):
    """What lies on disk is raw."""
    folder = tmp_path / "session"
    options = {"max_new_tokens": 12, "temperature": 0.0}
    with TriForce(model_of(family), **SMALL, wire=saved) as engine:
        with engine.session() as session:
            first = session.generate(PROMPT, **options)
            session.save(folder)
        expected = engine.generate(torch.tensor([first.prompt_ids + first.token_ids + [7, 8]]), **options).token_ids
    with TriForce(model_of(family), **SMALL, wire=loaded) as engine, engine.load_session(folder) as session:
        again = session.generate(torch.tensor([first.prompt_ids + first.token_ids + [7, 8]]), **options)
    assert again.token_ids == expected
    assert again.stats.reused_tokens > 150


def test_a_text_is_cut_inside_a_coded_tile():
    """Its tokens return to the tail; what is read again is only what is new."""
    ids = PROMPT[0].tolist()
    other = torch.tensor([ids[:90] + ids[20:70]])  # tiles of 32: the third is cut
    with TriForce(model_of("llama"), **SMALL, wire="coded") as engine:
        engine.generate(PROMPT, max_new_tokens=5, temperature=0.0)
        result = engine.generate(other, max_new_tokens=NEW, temperature=0.0)
    assert result.stats.reused_tokens == 90
    with TriForce(model_of("llama"), **SMALL, wire="raw") as engine:
        engine.generate(PROMPT, max_new_tokens=5, temperature=0.0)
        assert engine.generate(other, max_new_tokens=NEW, temperature=0.0).token_ids == result.token_ids


def test_no_memory_for_a_raw_tile(monkeypatch):
    """In the middle of an answer: it is refused, and when there is memory again, the same tokens come as ever."""
    expected = answer("llama", "raw", gamma=0)[0].token_ids
    made, room = [], 3 * 4  # tiles: those of the prompt, in three layers

    def free():
        made.append(1)
        return 10**12 if len(made) <= room else 0

    monkeypatch.setattr(runtime, "free_on_host", free)
    monkeypatch.setattr(wire_format, "ROOM", 0.0)
    with TriForce(model_of("llama"), **{**SMALL, "gamma": 0}, wire="coded") as engine:
        for _ in range(2):  # it can be tried again, and is refused again
            with pytest.raises(MemoryLimitError, match="cannot be coded any smaller"):
                engine.generate(PROMPT, max_new_tokens=NEW, temperature=0.0, seed=3)
        room = 10**6
        result = engine.generate(PROMPT, max_new_tokens=NEW, temperature=0.0, seed=3)
        assert result.token_ids == expected
