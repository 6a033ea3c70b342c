"""Logits through the pipeline are those of the simplest path, bit for bit, whatever the threads do."""

from __future__ import annotations

from collections import deque
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from offload_triforce.cache.full import FullCache
from offload_triforce.config import Settings
from offload_triforce.kernels import ops, reference
from offload_triforce.model.adapter import attached
from offload_triforce.model.layer_view import LayerView
from offload_triforce.model.layout import probe
from offload_triforce.runtime.levels import RetrievalLevel, TargetLevel
from offload_triforce.runtime.runtime import Runtime
from offload_triforce.runtime.session import Session
from offload_triforce.scheduler import codec
from offload_triforce.scheduler.device import CudaDevice
from offload_triforce.scheduler.emulated import Chaos, EmulatedDevice, ThreadLane
from offload_triforce.scheduler.pipeline import TileStream
from offload_triforce.scheduler.store import Leaving
from offload_triforce.speculation.tree import Node
from tests.scheduler.devices import EagerDevice, LateDevice, chaotic
from tests.tiny import prompt_ids, tiny_model
from tests.usual import first

SETTINGS = Settings(
    chunk=2,
    sink=2,
    recent=3,
    budget=24,
    bits=16,
    gamma=3,
    draft_tokens=4,
    tile=6,
    ring=3,
    prefill_chunk=13,
    resident=0.2,
)
PROMPT, PASSES = 50, 4


def block():
    """A tree: the root, a path of two behind it, and another node beside its first. The path will be accepted."""
    root = Node(4, None)
    first = Node(5, root)
    return [root, first, Node(6, root), Node(7, first), Node(8, first)], [0, 1, 3]


def logits(model, layout, device, prompt=None, passes=PASSES, settings=SETTINGS, ahead=False):
    """All logits of a prefill and some passes, each of 5 tokens of which 3 are kept: [passes * 5, V]; what the caches
    then hold: keys and values of each full layer, states and tails of the recurrent ones; and the retrieval cache.

    ``ahead``: the retrieval level drafts ahead while a pass is under way.
    """
    prompt = prompt_ids(PROMPT)[0] if prompt is None else prompt
    runtime = Runtime(model, layout, settings, len(prompt) + 5 * passes + 4, device=device)
    rows, steps = [], 0
    try:
        with attached(model), torch.no_grad():
            Session(runtime).begin(prompt)
            target = TargetLevel(model, runtime.caches, "each pass")
            retrieval = RetrievalLevel(model, runtime.caches)
            for _ in range(passes):
                nodes, kept = block()
                held = []

                def idle(nodes=nodes, held=held):
                    nonlocal steps
                    if ahead and len(held) < 4:
                        retrieval.score([Node(9, held[-1]) if held else nodes[0]], held)
                        held.append(Node(9, held[-1] if held else None))
                        steps += 1

                rows.append(target.score(nodes, idle))
                retrieval.keep([])
                target.commit(kept)
        assert bool(steps) == ahead
        kept = [runtime.caches.full.read(layer).clone() for layer in range(len(layout.full))]
        kept += [] if runtime.caches.recurrent is None else runtime.caches.recurrent.snapshot().values()
        retrieval = runtime.caches.retrieval
        return torch.cat(rows), kept, torch.cat([retrieval.store.kv.flatten(), retrieval.settled.flatten()])
    finally:
        runtime.close()


# A hybrid's copies run on while recurrent layers compute: before, between and behind those that attend.
HYBRID = {"num_hidden_layers": 6, "layer_types": ["linear_attention", "full_attention", "linear_attention"] * 2}
MODELS = {"llama": lambda: tiny_model("llama"), "hybrid": lambda: tiny_model("qwen3.5", **HYBRID)}


def prepared(model):
    layout = probe(model)
    return model, layout, logits(model, layout, EagerDevice())


@pytest.fixture(scope="module")
def llama():
    return prepared(MODELS["llama"]())


@pytest.fixture(scope="module", params=MODELS)
def any_model(request):
    return prepared(MODELS[request.param]())


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        for part, same in zip(one, other, strict=True):
            assert torch.equal(part, same)


# A missing wait shows with fewer seeds than the normal run takes, see below.
@pytest.mark.parametrize("tens", first(2, range(0, 20, 2)))
def test_bit_identical_under_200_seeds(llama, tens):
    model, layout, expected = llama
    for seed in range(10 * tens, 10 * tens + 20):
        assert_same(logits(model, layout, chaotic(seed)), expected)


@pytest.mark.parametrize("tens", first(1, range(4)))
def test_so_is_a_hybrid_under_40(tens):
    model, layout, expected = prepared(MODELS["hybrid"]())
    assert any(part.dim() == 4 and part.shape[0] == 4 for part in expected[1]), "the states of its recurrent layers"
    for seed in range(10 * tens, 10 * tens + 10):
        assert_same(logits(model, layout, chaotic(seed)), expected)


@pytest.mark.parametrize("seeds", first(1, [range(6), range(6, 20)]), ids=str)
def test_drafting_ahead_changes_no_bit_of_a_pass(any_model, seeds):
    """The retrieval level reads its cache with the same weights while the pass writes there. States are shared, too."""
    model, layout, expected = any_model
    for seed in seeds:
        assert_same(logits(model, layout, chaotic(seed, longest_ms=0.5), ahead=True), expected)
    assert_same(logits(model, layout, LateDevice(), ahead=True), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"ring": 1},
        {"ring": 9, "resident": 0.0},
        {"resident": 0.9},
        {"tile": 2},
        {"resident": 0.7, "prefill_resident": 0.2},
        {"resident": 1.0, "prefill_resident": 0.0},
        {"hidden_states": "host"},
        {"hidden_states": "host", "prefill_chunk": 50, "resident": 0.5, "prefill_resident": 0.0},
    ],
)
def test_other_plans(any_model, settings):
    """Residency and ring move tiles about, and change no bit; another tile size rounds otherwise."""
    model, layout, _ = any_model
    changed = Settings(**{**vars(SETTINGS), **settings})
    expected = logits(model, layout, EagerDevice(), settings=changed)
    assert_same(logits(model, layout, chaotic(3), settings=changed), expected)


def test_the_cpu_device_as_it_is_used(llama):
    model, layout, expected = llama
    assert_same(logits(model, layout, EmulatedDevice(gbps=0.05, latency_us=50)), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda(dtype):
    model = tiny_model("llama").to("cuda", dtype)
    layout = probe(model)
    expected = logits(model, layout, EagerDevice("cuda"))
    for _ in range(5):
        assert_same(logits(model, layout, CudaDevice(torch.device("cuda"))), expected)


# In bf16, tiles of a multiple of 8 tokens, coded or raw. One leaves with the first commit, and the third pass reads it.
CODED_PROMPT = prompt_ids(54)[0]
CODED, UNCODED = (Settings(**{**vars(SETTINGS), "tile": 8, "wire": wire}) for wire in ("coded", "raw"))


def coded_case(name, where="cpu"):
    """A model in bf16, and what the simplest path over raw tiles gives."""
    model = MODELS[name]().to(where, torch.bfloat16)
    layout = probe(model)
    return model, layout, logits(model, layout, EagerDevice(where), CODED_PROMPT, settings=UNCODED)


@pytest.mark.parametrize("changes", [{}, {"ring": 1}, {"resident": 0.7, "prefill_resident": 0.2}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_coded_tiles_change_no_bit(name, changes, monkeypatch):
    """Under chaos; where some tiles do not fit and go raw; and while the retrieval level drafts ahead."""
    model, layout, expected = coded_case(name)
    settings = Settings(**{**vars(CODED), **changes})
    run = partial(logits, model, layout, prompt=CODED_PROMPT, settings=settings)
    assert_same(run(LateDevice()), expected)
    for seed in range(3):
        assert_same(run(chaotic(seed)), expected)
    if not changes:  # with few tiles on their way, there may be no time to draft in
        assert_same(run(chaotic(7, longest_ms=0.5), ahead=True), expected)
    monkeypatch.setattr(codec, "fits", lambda place: int(place.long().sum()) % 3 > 0)
    assert_same(run(chaotic(8)), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_coded_tiles_change_no_bit_on_cuda(name):
    model, layout, expected = coded_case(name, "cuda")
    for _ in range(5):
        device = CudaDevice(torch.device("cuda"))
        assert_same(logits(model, layout, device, CODED_PROMPT, settings=CODED), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [SETTINGS, CODED], ids=["raw", "coded"])
def test_cuda_waits_for_nothing_in_a_pass(monkeypatch, settings):
    model = tiny_model("llama").to("cuda", torch.float32 if settings is SETTINGS else torch.bfloat16)
    score = TargetLevel.score

    def watched(self, nodes, idle):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return score(self, nodes, idle)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(TargetLevel, "score", watched)
    logits(model, probe(model), CudaDevice(torch.device("cuda")), settings=settings)


@pytest.mark.xdist_group("smollm2")
def test_smollm2(smollm2):
    model, tokenizer = smollm2
    layout = probe(model)
    prompt = tokenizer("The link is never idle. " * 24, return_tensors="pt").input_ids[0]
    settings = Settings(budget=96, bits=16, gamma=3, draft_tokens=4, tile=16, ring=3, recent=32)
    expected = logits(model, layout, EagerDevice(), prompt, passes=2, settings=settings)
    assert_same(logits(model, layout, chaotic(0, longest_ms=0.5), prompt, 2, settings), expected)


# --- every wait, removed


def _arrival(monkeypatch):
    """Attention reads a slot before its tile has landed."""

    class Flying(deque):
        def popleft(self):
            *where, _ = super().popleft()
            return *where, SimpleNamespace(wait=lambda: None, arrived=lambda: True)

    begin = TileStream.begin

    def mutated(self, tiles):
        self._flying = Flying()
        begin(self, tiles)

    monkeypatch.setattr(TileStream, "begin", mutated)


def _slot(monkeypatch):
    """A tile is copied into a slot that is still being read."""
    submit = ThreadLane.submit

    def mutated(self, target, source, after=None, first=None, then=None):
        return submit(self, target, source, None if self is self._owner.incoming else after, first, then)

    monkeypatch.setattr(ThreadLane, "submit", mutated)


def _attention(monkeypatch):
    """A layer goes on before all tiles are in its attention."""
    monkeypatch.setattr(EmulatedDevice, "finish", lambda self: None)


def _source(monkeypatch):
    """A prefill writes the next layer's keys and values over those that are leaving."""
    nothing = property(lambda self: None, lambda self, value: None)
    monkeypatch.setattr(LayerView, "leaving", nothing, raising=False)


def _source_behind_a_recurrent_layer(monkeypatch):
    """The same, if a layer that attends comes next but one: the layer between has nothing that leaves."""

    def put(self, leaving):
        self._left = None if leaving is getattr(self, "_left", None) else leaving

    monkeypatch.setattr(LayerView, "leaving", property(lambda self: self._left, put), raising=False)


def _prompt(monkeypatch):
    """The first pass reads tiles that have not left the device yet."""
    end_fill = FullCache.end_fill

    def mutated(self, tokens):
        leaving, self._leaving = self._leaving, Leaving()
        end_fill(self, tokens)
        self._leaving = leaving

    monkeypatch.setattr(FullCache, "end_fill", mutated)


def _news(monkeypatch):
    """Tiles of new tokens are dropped from the tail, and read, before they have left it."""
    monkeypatch.setattr(FullCache, "landed", lambda self: setattr(self, "_leaving", Leaving()))


def _settling(monkeypatch):
    """Coded tiles are read without a look at whether they fit. (Here, none does.)"""
    monkeypatch.setattr(codec, "fits", lambda place: False)
    monkeypatch.setattr(codec.CodedTiles, "_settle", lambda self, key, place, written: None)
    encode = ops.wire_encode

    def broken(kv, coded, format):
        encode(kv, coded, format)
        coded[16:].zero_()

    monkeypatch.setattr(ops, "wire_encode", broken)


WAITS = [_arrival, _slot, _attention, _source, _prompt, _news]
CASES = [(name, wait, "raw") for name in MODELS for wait in WAITS]
CASES += [("hybrid", _source_behind_a_recurrent_layer, "raw")]
CASES += [("llama", wait, "coded") for wait in (*WAITS, _settling)]


@pytest.mark.parametrize(("name", "wait", "wire"), CASES, ids=lambda part: getattr(part, "__name__", part).strip("_"))
def test_a_missing_wait_shows(name, wait, wire, monkeypatch):
    model, layout, expected = coded_case(name) if wire == "coded" else prepared(MODELS[name]())
    settings, prompt = (CODED, CODED_PROMPT) if wire == "coded" else (SETTINGS, None)
    wait(monkeypatch)

    def wrong(device):
        try:
            actual = logits(model, layout, device, prompt, settings=settings)
        except RuntimeError:
            return True
        return not torch.equal(actual[0], expected[0])

    # Delays at random, and the longest: a copy that nobody waits for never lands.
    devices = [*(partial(EmulatedDevice, chaos=Chaos(seed, 10.0)) for seed in range(2)), LateDevice]
    devices += [partial(EmulatedDevice, chaos=Chaos(seed, 10.0)) for seed in range(2, 8)]
    assert any(wrong(make()) for make in devices)


class _HostWaits(TorchDispatchMode):
    """Finds the operations for which the host of a CUDA device would have to wait: their result decides a shape."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if masks or name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "repeat_interleave"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llama", "qwen2-sliding", "gemma3", "gemma2", "qwen3.5"])
def test_no_operation_of_a_pass_makes_the_host_wait(family, monkeypatch):
    """With refresh and write-back, as on CUDA: without the CPU's own shortcuts, and gathering is a kernel there."""
    model = tiny_model(family)
    waits = _HostWaits()

    gather_chunks = reference.gather_chunks

    def gather(source, kv, slots):
        with torch.utils._python_dispatch._disable_current_modes():
            gather_chunks(source, kv, slots)

    monkeypatch.setattr(reference, "gather_chunks", gather)
    monkeypatch.setattr(ops, "cpu", reference)
    score = TargetLevel.score

    def watched(self, nodes, idle):
        with waits:
            return score(self, nodes, idle)

    monkeypatch.setattr(TargetLevel, "score", watched)
    logits(model, probe(model), EagerDevice())
    assert waits.found == []
    with waits:
        torch.zeros(3).nonzero()
    assert waits.found == ["nonzero"], "the instrument works"
