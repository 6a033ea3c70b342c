"""Logits through the pipeline are those of the simplest path, bit for bit, whatever the threads do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from offload_triforce.config import Settings
from offload_triforce.kernels import ops, reference
from offload_triforce.model.adapter import attached
from offload_triforce.model.layout import probe
from offload_triforce.runtime.levels import RetrievalLevel, TargetLevel
from offload_triforce.runtime.runtime import Runtime
from offload_triforce.runtime.session import Session
from offload_triforce.scheduler.device import CudaDevice
from offload_triforce.scheduler.emulated import Chaos, EmulatedDevice
from offload_triforce.scheduler.pipeline import TileStream
from offload_triforce.scheduler.store import Leaving
from offload_triforce.speculation.tree import Node
from tests.scheduler.devices import EagerDevice, LateDevice, chaotic
from tests.tiny import prompt_ids, tiny_model

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
    """All logits of a prefill and some passes, each of 5 tokens of which 3 are kept: [passes * 5, V].

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
        retrieval = runtime.caches.retrieval
        return torch.cat(rows), kept, torch.cat([retrieval.store.kv.flatten(), retrieval.settled.flatten()])
    finally:
        runtime.close()


@pytest.fixture(scope="module")
def llama():
    model = tiny_model("llama")
    layout = probe(model)
    return model, layout, logits(model, layout, EagerDevice())


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        for part, same in zip(one, other, strict=True):
            assert torch.equal(part, same)


@pytest.mark.parametrize("tens", range(0, 20, 2))
def test_bit_identical_under_200_seeds(llama, tens):
    model, layout, expected = llama
    for seed in range(10 * tens, 10 * tens + 20):
        assert_same(logits(model, layout, chaotic(seed)), expected)


def test_drafting_ahead_changes_no_bit_of_a_pass(llama):
    """The retrieval level reads its cache with the same weights while the pass writes there."""
    model, layout, expected = llama
    for seed in range(20):
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
def test_other_plans(llama, settings):
    """Residency and ring move tiles about, and change no bit; another tile size rounds otherwise."""
    model, layout, _ = llama
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


@pytest.mark.gpu
def test_cuda_waits_for_nothing_in_a_pass(monkeypatch):
    model = tiny_model("llama").to("cuda")
    score = TargetLevel.score

    def watched(self, nodes, idle):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return score(self, nodes, idle)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(TargetLevel, "score", watched)
    logits(model, probe(model), CudaDevice(torch.device("cuda")))


@pytest.mark.xdist_group("smollm2")
def test_smollm2(smollm2):
    model, tokenizer = smollm2
    layout = probe(model)
    prompt = tokenizer("The link is never idle. " * 60, return_tensors="pt").input_ids[0]
    settings = Settings(budget=128, bits=16, gamma=3, draft_tokens=4, tile=32, ring=3)
    expected = logits(model, layout, EagerDevice(), prompt, passes=2, settings=settings)
    for seed in range(2):
        assert_same(logits(model, layout, chaotic(seed, longest_ms=0.5), prompt, 2, settings), expected)


@pytest.mark.parametrize("mutation", ["arrival", "slot", "source"])
def test_a_missing_wait_shows(llama, monkeypatch, mutation):
    model, layout, expected = llama

    def wrong(seed):
        device = EmulatedDevice(chaos=Chaos(seed, 10.0))
        if mutation == "slot":
            submit = device.incoming.submit
            device.incoming.submit = lambda target, source, after=None: submit(target, source)
        try:
            actual = logits(model, layout, device, passes=2)
        except RuntimeError:
            return True
        return not torch.equal(actual[0], expected[0][:10])

    if mutation == "arrival":

        class Flying(list):
            def popleft(self):
                slot, _ = self.pop(0)
                return slot, SimpleNamespace(wait=lambda: None, arrived=lambda: True)

        begin = TileStream.begin

        def mutated(self, tiles):
            self._flying = Flying()
            begin(self, tiles)

        monkeypatch.setattr(TileStream, "begin", mutated)
    if mutation == "source":
        monkeypatch.setattr(Leaving, "wait", lambda self, end=None: None)
    assert any(wrong(seed) for seed in range(8))


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
