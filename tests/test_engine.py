"""The engine around the algorithm: settings, limits, streams of text, counts, and interruptions."""

import json
import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer

from offload_triforce import InputError, MemoryLimitError, Settings, TriForce
from offload_triforce.runtime import runtime
from offload_triforce.runtime.runtime import PREFILL_QUERIES, Runtime
from tests.byte_tokenizer import byte_tokenizer
from tests.tiny import disturbed, greedy, prompt_ids, tiny_model

SMALL = {"budget": 48, "gamma": 4, "gamma1": 3, "chunk": 4, "sink": 4, "recent": 16, "tile": 16, "draft_cache": 64}
SMALL |= {
    "link_gbps": 1000.0,
    "adaptive": False,
    "overlap": False,
    "draft_tokens": 8,
    "topk": 2,
    "width": 2,
}  # the same drafts in each run
PROMPT, NEW = prompt_ids(150), 32
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", seed=1, calm=True)


@pytest.fixture(scope="module")
def expected(model):
    return greedy(model, PROMPT, NEW)


@pytest.fixture
def engine(model):
    with TriForce(model, draft="self", **SMALL) as engine:
        yield engine


# --- settings


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bugdet": 5}, "unknown setting 'bugdet'; did you mean 'budget'?"),
        ({"prefil_chunk": 5}, "did you mean 'prefill_chunk'?"),
        ({"zzz": 5}, "unknown setting 'zzz'; known settings: context, budget, gamma"),
        ({"context": 1}, "context must be a whole number of at least 2, not 1"),
        ({"budget": 0}, "budget must be a whole number of at least 1, not 0"),
        ({"gamma": -1}, "gamma must be a whole number of at least 0, not -1"),
        ({"gamma1": 1.5}, "gamma1 must be a whole number of at least 0, not 1.5"),
        ({"chunk": True}, "chunk must be a whole number of at least 1, not True"),
        ({"tile": "lots"}, "tile 'lots' is not a number of tokens"),
        ({"ring": 0}, "ring must be a whole number"),
        ({"prefill_chunk": 0}, "prefill_chunk must be a whole number"),
        ({"resident": 1.1}, "resident must be a share between 0 and 1, not 1.1"),
        ({"resident": -0.1}, "resident must be a share between 0 and 1, not -0.1"),
        ({"resident": float("nan")}, "resident must be a share between 0 and 1, not nan"),
        ({"resident": "half"}, "wrong type"),
        ({"link_gbps": 0}, "link_gbps must be greater than 0 and finite, not 0"),
        ({"sink": 6}, "sink must be a multiple of the chunk of 4, not 6"),
        ({"tile": 30}, "tile must be a multiple of the chunk of 4, not 30"),
        ({"sink": 32}, r"tile (16) must not be smaller than sink (32)"),
        ({"context": 40}, "budget 48 is larger than the context of 40 tokens by 8; a quarter"),
        ({"draft_cache": 10}, "draft_cache 10 is too small for gamma1 3; use at least 18"),
        ({"draft_cache": 4096}, "draft_cache 4096 exceeds the draft model's 2048 positions; set it to 2048 or less"),
        ({"context": 3000}, "context 3,000 exceeds the model's 2,048 positions by 952; set it to 2,048 or less"),
    ],
)
def test_settings_refused(model, changes, words):
    """Before anything is allocated, by name, with the numbers and with what would do."""
    with pytest.raises(InputError) as error:
        TriForce(model, draft="self", settings=Settings(**SMALL), **changes)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_budget_too_small_for_a_chunk(model):
    with pytest.raises(InputError, match=r"budget 20 leaves no room for a single chunk.*need at least 24 tokens"):
        TriForce(model, **{**SMALL, "budget": 20}).generate(PROMPT, **GREEDY)


def test_settings_from_mapping():
    assert Settings.from_mapping({"budget": 512, "gamma": 6}) == Settings(budget=512, gamma=6)
    with pytest.raises(InputError, match="did you mean 'gamma1'"):
        Settings.from_mapping({"gama1": 6})


@pytest.mark.parametrize(
    ("context", "budget"), [(100, 80), (2000, 500), (32768, 8192), (131072, 8192)], ids=lambda n: str(n)
)
def test_default_budget(context, budget):
    """A quarter of a short context, 8192 of a long one, and never less than sink, recent window and a chunk."""
    assert Settings().budget_for(context) == budget


@pytest.mark.parametrize("draft", ["fast", "", "Self"])
def test_unknown_draft(model, draft):
    with pytest.raises(
        InputError, match=f"unknown draft {draft!r}; use a loaded model, 'auto', 'ngram', 'mtp', 'self'"
    ):
        TriForce(model, draft=draft)


def test_draft_that_is_no_model(model):
    with pytest.raises(InputError, match="unknown draft"):
        TriForce(model, draft=7)


# --- limits


@pytest.mark.parametrize(
    ("settings", "tokens", "new", "words"),
    [
        ({}, 2000, 49, "2,000 prompt tokens and 49 new ones exceed the model's positions, 2,048, by 1; at most 48 new"),
        ({}, 2100, 5, "exceed the model's positions, 2,048, by 57; shorten the prompt by 53 tokens"),
        (
            {"context": 200},
            150,
            60,
            "150 prompt tokens and 60 new ones exceed the context setting, 200, by 10; at most",
        ),
        ({"context": 200}, 200, 1, "the context setting, 200, by 1; shorten the prompt by 1 tokens"),
    ],
)
def test_text_too_long(model, settings, tokens, new, words):
    with TriForce(model, **SMALL, **settings) as engine, pytest.raises(InputError) as error:
        engine.generate(prompt_ids(tokens), max_new_tokens=new, do_sample=False)
    assert words in str(error.value)


def test_text_that_just_fits(model):
    """The hints of the test above are right."""
    with TriForce(model, draft="self", context=200, **SMALL) as engine:
        assert engine.generate(PROMPT, max_new_tokens=50, do_sample=False).token_ids == greedy(model, PROMPT, 50)
        assert len(engine.generate(prompt_ids(199), max_new_tokens=1, do_sample=False).token_ids) == 1
    with TriForce(model, **{**SMALL, "tile": 256}) as engine:
        assert len(engine.generate(prompt_ids(2000), max_new_tokens=48, do_sample=False).token_ids) == 48


def test_memory_too_small(monkeypatch):
    """Refused before any allocation; what the message says would fit, fits."""
    model = tiny_model("llama", max_position_embeddings=10**7)
    free = 500_000_000
    monkeypatch.setattr("offload_triforce.planner.sizes.free_on_host", lambda: free)
    monkeypatch.setattr(Runtime, "_make_caches", lambda *_: SimpleNamespace(static_view=None))
    with TriForce(model, context=5_000_000) as engine, pytest.raises(MemoryLimitError) as error:
        engine.generate(PROMPT, **GREEDY)
    pattern = (
        r"a context of 5,000,000 tokens needs (\d\.\d) GB of host memory, but 0\.5 GB are free, (\d\.\d) GB too "
        r"little; a context of ([\d,]+) tokens would fit"
    )
    needed, missing, fits = re.fullmatch(pattern, str(error.value)).groups()
    assert float(needed) >= 5e6 * 3 * 2 * 12 * 4 / 1e9  # the KV alone
    assert abs(float(needed) - float(missing) - 0.5) < 0.11
    context = int(fits.replace(",", ""))
    assert context > 400_000
    TriForce(model, context=context)._texts.ensure(100)
    with pytest.raises(MemoryLimitError):
        TriForce(model, context=int(context * 1.2))._texts.ensure(100)


def test_no_memory_at_all(model, monkeypatch):
    monkeypatch.setattr("offload_triforce.planner.sizes.free_on_host", lambda: 0)
    with TriForce(model) as engine, pytest.raises(MemoryLimitError, match="free some memory or take a smaller model"):
        engine.generate(PROMPT, **GREEDY)


def test_allocation_that_fails(model, monkeypatch):
    """What psutil promised may be gone by then: still one sentence, and the engine can be used again."""

    def fails(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")

    engine = TriForce(model, draft="self", **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr("offload_triforce.runtime.runtime.TileStore", fails)
        with pytest.raises(MemoryLimitError, match="the caches for 182 tokens could not be allocated"):
            engine.generate(PROMPT, **GREEDY)
    assert engine.generate(PROMPT, **GREEDY).token_ids == greedy(model, PROMPT, NEW)
    engine.close()


def test_memory_that_runs_out_on_the_way(model, monkeypatch):
    """One sentence; and the caches are given back, so that the next request may fit."""

    def fails(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore than anybody reads.")

    with TriForce(model, **SMALL) as engine:
        with monkeypatch.context() as patch:
            patch.setattr("offload_triforce.runtime.group_reading.Prefill.run", fails)
            with pytest.raises(MemoryLimitError, match="Tried to allocate 2 GiB; take a shorter context") as error:
                engine.generate(PROMPT, **GREEDY)
        assert "\n" not in str(error.value)
        assert error.value.__context__ is None, "it would keep alive what filled the memory"
        assert engine.runtime is None
        assert engine.generate(PROMPT, **GREEDY).token_ids == greedy(model, PROMPT, NEW)


def test_memory_that_cannot_be_pinned(model, monkeypatch):
    def refused(self, layer, tile, kv):
        raise MemoryLimitError("0.5 GB of host memory could not be pinned (CUDA error 2)")

    with TriForce(model, **SMALL) as engine:
        with monkeypatch.context() as patch:
            patch.setattr("offload_triforce.scheduler.store.TileStore.write", refused)
            with pytest.raises(MemoryLimitError, match=r"memory ran out while decoding: 0\.5 GB of host memory"):
                engine.generate(PROMPT, **GREEDY)
        assert engine.generate(PROMPT, **GREEDY).token_ids == greedy(model, PROMPT, NEW)


def test_a_machine_on_which_triton_cannot_compile(monkeypatch):
    """Refused before anything is allocated, with what to do."""
    monkeypatch.setattr("offload_triforce.runtime.runtime.on", lambda device: nullcontext())
    found = SimpleNamespace(reason="Failed to find C compiler", remedy="install gcc and python3-dev")
    monkeypatch.setattr("offload_triforce.kernels.ops.what_stops_triton", lambda: found)
    runtime._check_kernels(torch.device("cpu"))
    with pytest.raises(InputError, match=r"do not run here \(Failed to find C compiler\); install gcc"):
        runtime._check_kernels(torch.device("cuda"))
    monkeypatch.setattr("offload_triforce.kernels.ops.what_stops_triton", lambda: None)
    runtime._check_kernels(torch.device("cuda"))


# --- text


TEXT = "Grün 世! 🚀\n\té 👩‍👧"


class Dictate:
    """A logits processor that makes any model say ``ids`` after ``start`` tokens."""

    def __init__(self, start, ids):
        self.start, self.ids = start, ids

    def __call__(self, input_ids, scores):
        said = min(input_ids.shape[1] - self.start, len(self.ids) - 1)
        return torch.full_like(scores, -100.0).index_fill_(1, torch.tensor(self.ids[said]), 0.0)


@pytest.fixture(scope="module")
def byte_model():
    return tiny_model("llama", seed=1, calm=True, vocab_size=259)


def dictated(engine, **options):
    ids = byte_tokenizer()(TEXT).input_ids
    return engine.stream(
        PROMPT, max_new_tokens=len(ids), do_sample=False, logits_processor=[Dictate(150, ids)], **options
    )


@pytest.mark.parametrize("gamma", [0, 1, 4, 7])
def test_pieces_make_up_the_text(byte_model, gamma):
    """One token per byte: every pass may end inside of a character, and no half character is ever said."""
    with TriForce(byte_model, byte_tokenizer(), draft="ngram", **{**SMALL, "gamma": gamma}) as engine:
        stream = dictated(engine)
        pieces = list(stream)
    assert "".join(pieces) == stream.result.text == TEXT
    assert len(pieces) > 3
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.mark.parametrize("seed", range(2))
def test_pieces_of_bytes_that_are_no_text(byte_model, seed):
    with TriForce(byte_model, byte_tokenizer(), draft="self", **SMALL) as engine:
        stream = engine.stream(PROMPT, max_new_tokens=NEW, temperature=2.0, seed=seed)
        assert "".join(stream) == stream.result.text
        assert stream.result.text == engine.tokenizer.decode(stream.result.token_ids, skip_special_tokens=True)


def test_text_that_ends_inside_a_character(byte_model):
    """What there is of it comes out at the end, as the tokenizer spells it."""
    ids = byte_tokenizer()("ab🚀").input_ids[:-1]
    with TriForce(byte_model, byte_tokenizer(), **{**SMALL, "gamma": 0}) as engine:
        stream = engine.stream(PROMPT, max_new_tokens=len(ids), do_sample=False, logits_processor=[Dictate(150, ids)])
        assert list(stream) == ["a", "b", "\N{REPLACEMENT CHARACTER}"]
        assert stream.result.text == "ab\N{REPLACEMENT CHARACTER}"


def test_text_prompt(byte_model):
    tokenizer = byte_tokenizer()
    with TriForce(byte_model, tokenizer, draft="self", **SMALL) as engine:
        result = engine.generate("To be, or not to be", **GREEDY)
        ids = tokenizer("To be, or not to be", return_tensors="pt").input_ids
        assert result.prompt_ids == ids[0].tolist()
        assert result.token_ids == greedy(byte_model, ids, NEW)
        assert result.text == tokenizer.decode(result.token_ids, skip_special_tokens=True)
        assert result.sequences.tolist() == [result.prompt_ids + result.token_ids]


def test_without_tokenizer(engine, expected):
    stream = engine.stream(PROMPT, **GREEDY)
    assert list(stream) == []
    assert (stream.result.text, stream.result.token_ids) == ("", expected)


def test_result_grows_with_the_stream(byte_model):
    with TriForce(byte_model, byte_tokenizer(), draft="none", **SMALL) as engine:
        stream = dictated(engine)
        assert stream.result.token_ids == []
        said = ""
        for piece in stream:
            said += piece
            assert stream.result.text.startswith(said)
        assert stream.result.text == said
        with pytest.raises(StopIteration):
            next(stream)


# --- streamers


class Recorder(BaseStreamer):
    """Writes down what it is given; raises at the ``fatal``-th call."""

    def __init__(self, fatal=None, error=KeyboardInterrupt):
        self.seen, self.ended, self.fatal, self.error = [], 0, fatal, error

    def put(self, value):
        if len(self.seen) == self.fatal:
            raise self.error
        self.seen.append(value.tolist())

    def end(self):
        self.ended += 1


def test_streamer_gets_prompt_and_tokens(engine, expected):
    streamer = Recorder()
    engine.generate(PROMPT, streamer=streamer, **GREEDY)
    assert streamer.seen == [PROMPT.tolist(), *([token] for token in expected)]
    assert streamer.ended == 1


def test_text_streamers_of_transformers(byte_model, capsys):
    tokenizer = byte_tokenizer()
    with TriForce(byte_model, tokenizer, draft="self", **SMALL) as engine:
        list(dictated(engine, streamer=TextStreamer(tokenizer, skip_prompt=True)))
        assert capsys.readouterr().out == TEXT + "\n"
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=5)
        list(dictated(engine, streamer=streamer))
        assert "".join(streamer) == TEXT


def test_streamer_is_ended_after_an_error(engine):
    streamer = Recorder(fatal=5, error=ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        engine.generate(PROMPT, streamer=streamer, **GREEDY)
    assert streamer.ended == 1


# --- statistics


@pytest.mark.parametrize("draft", ["self", "ngram", "none"])
def test_stats_are_consistent(model, draft):
    with TriForce(model, draft=draft, **SMALL) as engine:
        stats = engine.generate(PROMPT, **GREEDY).stats
    assert (stats.prompt_tokens, stats.new_tokens, stats.interrupted) == (150, NEW, False)
    assert stats.new_tokens == stats.retrieval.accepted + stats.passes
    assert stats.tokens_per_pass == NEW / stats.passes > 1
    assert stats.link_bytes_per_token == stats.link_bytes / NEW > 0
    assert stats.ms_per_token == pytest.approx(1e3 * stats.decode_s / NEW)
    assert 0 < stats.draft_s < stats.decode_s
    assert 0 < stats.prefill_s < stats.ttft_s < stats.prefill_s + stats.decode_s
    assert stats.full_kv_bytes == (150 + NEW - 1) * 3 * 2 * 12 * 4
    for level in (stats.draft, stats.retrieval):
        assert level.accepted <= level.judged <= level.proposed
        assert level.rate == (level.accepted / level.judged if level.judged else None)
    assert stats.passes < stats.retrieval.proposed <= 8 * stats.passes
    assert (stats.draft.proposed == 0) == (draft == "none")
    report = stats.as_dict()
    assert json.loads(json.dumps(report)) == report
    assert report["acceptance"] == {"draft": stats.draft.rate, "retrieval": stats.retrieval.rate}


@pytest.mark.parametrize("gamma", [0, 4])
@pytest.mark.parametrize("family", ["llama", "qwen2-sliding"])
def test_link_bytes(family, gamma):
    """Counted while copying, and computed here from nothing but the lengths of the passes."""
    model = tiny_model(family, seed=1, calm=True)
    with TriForce(model, draft="self", **{**SMALL, "gamma": gamma}) as engine:
        stream = engine.stream(PROMPT, **GREEDY)
        passes = [len(tokens) for tokens in stream._tokens]
        layers = len(engine.layout.full)
        tile_bytes = 16 * engine.layout.token_bytes(engine.layout.full[0])
        keep = engine.runtime.caches.full.keep
    stats = stream.stats
    assert sum(passes) == NEW
    assert len(passes) == stats.passes
    committed = 149  # the last token of the prompt is read by the first pass
    tiles = (committed - keep) // 16
    assert stats.prefill_link_bytes == tiles * layers * tile_bytes
    moved = leaving = 0
    for tokens in passes:
        moved += tiles
        committed += tokens
        tiles, leaving = tiles + leaving, 0  # what left beside this pass is fetched from the next one on
        while committed - (tiles + leaving) * 16 >= 16 + keep:
            moved += 1
            leaving += 1
    assert tiles > 8
    assert stats.link_bytes == moved * layers * tile_bytes


def test_second_run_counts_from_zero(engine):
    runs = [engine.generate(PROMPT, **GREEDY).stats.as_dict() for _ in range(2)]
    assert [run["reused_tokens"] for run in runs] == [0, runs[0]["prompt_tokens"] - 1 - PREFILL_QUERIES]
    others = ("ms_per_token", "reused_tokens", "prefill_link_bytes")
    counts = [{k: v for k, v in run.items() if not k.endswith("_s") and k not in others} for run in runs]
    assert counts[0] == counts[1]


def test_progress(engine):
    steps = []
    engine.generate(PROMPT, progress=lambda done, total: steps.append((done, total)), **GREEDY)
    assert steps == [(1, 3), (2, 3), (3, 3)]


# --- interruptions


def assert_as_before(engine, model, expected):
    assert model.config._attn_implementation == "sdpa"
    assert not any("forward" in vars(module) for module in model.modules())
    assert greedy(model, PROMPT, 5) == expected[:5]
    assert engine.generate(PROMPT, **GREEDY).token_ids == expected
    other = prompt_ids(77, seed=5)
    assert engine.generate(other, max_new_tokens=12, do_sample=False).token_ids == greedy(model, other, 12)


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("step", [1, 2, 3])
def test_interrupted_between_two_steps_of_the_prefill(engine, model, expected, step):
    streamer = Recorder()
    progress = lambda done, total: interrupt() if done == step else None  # noqa: E731
    stream = engine.stream(PROMPT, progress=progress, streamer=streamer, **GREEDY)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    assert stream.result.token_ids == []
    assert stream.stats.interrupted
    assert streamer.ended == 1
    assert_as_before(engine, model, expected)


@pytest.mark.parametrize(
    ("place", "calls"),
    [("norm", 0), *[("layers.1.mlp", calls) for calls in (0, 1, 2, 3, 9, 40, 41, 70)]],
)
def test_interrupted_anywhere(engine, model, expected, place, calls):
    """While arguments are recorded, inside of a layer of the prefill, of drafting, of level 1 and of a pass."""
    count = 0

    def hook(*_):
        nonlocal count
        count += 1
        if count > calls:
            raise KeyboardInterrupt

    handle = model.model.get_submodule(place).register_forward_pre_hook(hook)
    stream = engine.stream(PROMPT, **GREEDY)
    try:
        with pytest.raises(KeyboardInterrupt):
            list(stream)
    finally:
        handle.remove()
    tokens = stream.result.token_ids
    assert tokens == expected[: len(tokens)]
    assert stream.stats.new_tokens == len(tokens)
    assert stream.stats.interrupted
    assert (len(tokens) > 0) == (calls >= 9)
    assert_as_before(engine, model, expected)


@pytest.mark.parametrize("fatal", [0, 1, 30])
def test_interrupted_in_the_streamer(engine, model, expected, fatal):
    streamer = Recorder(fatal)
    stream = engine.stream(PROMPT, streamer=streamer, **GREEDY)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    tokens = stream.result.token_ids
    assert tokens == expected[: len(tokens)]
    assert len(tokens) >= fatal
    assert streamer.ended == 1
    assert_as_before(engine, model, expected)


def test_reader_goes_away(byte_model):
    """Between two pieces the model is itself; closing the generator marks the answer as interrupted."""
    expected = greedy(byte_model, PROMPT, NEW)
    streamer = Recorder()
    with TriForce(byte_model, byte_tokenizer(), draft="self", **SMALL) as engine:
        stream = engine.stream(PROMPT, streamer=streamer, **GREEDY)
        for _ in stream:
            assert byte_model.config._attn_implementation == "sdpa"
            break
        iter(stream).close()
        assert stream.stats.interrupted
        assert streamer.ended == 1
        assert stream.result.token_ids == expected[: len(stream.result.token_ids)] != []
        assert engine.generate(PROMPT, **GREEDY).token_ids == expected


def test_error_in_the_draft_leaves_both_models_as_they_were(model, expected):
    draft = disturbed(model, 0.03)
    draft.set_attn_implementation("eager")
    with TriForce(model, draft=draft, **SMALL) as engine:
        handle = draft.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(PROMPT, **GREEDY)
        handle.remove()
        assert draft.config._attn_implementation == "eager"
        assert_as_before(engine, model, expected)


def test_closed_engine_opens_again(engine, expected):
    assert engine.generate(PROMPT, **GREEDY).token_ids == expected
    engine.close()
    engine.close()
    assert engine.generate(PROMPT, **GREEDY).token_ids == expected


@pytest.mark.parametrize("draft", ["self", "ngram", "none"])
def test_sampling_with_a_seed(model, draft):
    with TriForce(model, draft=draft, **SMALL) as engine:
        answers = [
            engine.generate(PROMPT, max_new_tokens=NEW, temperature=1.5, seed=seed).token_ids for seed in (3, 3, 4)
        ]
    assert answers[0] == answers[1] != answers[2]
