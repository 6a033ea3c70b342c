"""The planner's counts of what the host issues are those of the code, in both directions."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from offload_triforce import TriForce
from offload_triforce.kernels import ops
from offload_triforce.kernels.wire_format import WireFormat
from offload_triforce.planner import host_work
from offload_triforce.runtime.levels import RetrievalLevel, TargetLevel
from offload_triforce.scheduler.pipeline import TileStream
from offload_triforce.scheduler.plan import TilePlan
from offload_triforce.scheduler.store import TileStore
from tests.scheduler.fake_cuda import FakeCuda, FakeCudaDevice, FakeStream
from tests.tiny import prompt_ids, tiny_model

SMALL = {"chunk": 4, "sink": 4, "recent": 16, "tile": 64, "draft_cache": 64, "budget": 64, "gamma": 6, "gamma1": 2}
TREE = {**SMALL, "topk": 3, "width": 3, "draft_tokens": 20, "adaptive": False, "overlap": False, "draft": "none"}
# What these launch where Triton has the kernels; what they do on a CPU instead is left out.
KERNELS = {
    (ops.RunningAttention, "start"): 0,
    (ops.RunningAttention, "update"): 1,
    (ops.RunningAttention, "update_tile"): 1,
    (ops.RunningAttention, "update_coded"): 1,
    (ops.RunningAttention, "finish"): 1,
    (ops.RunningAttention, "logsumexp"): 1,
    (ops.RunningChoice, "start"): 0,
    (ops.RunningChoice, "see"): 2,
    (ops, "decode_keys"): 1,
    (ops, "chunk_scores"): 1,
    (ops, "tree_convolution"): 1,
    (ops, "delta_tree"): 2,
}


class Operations(TorchDispatchMode):
    """Counts operations that are no views, but for those inside of a kernel's twin."""

    def __init__(self):
        super().__init__()
        self.counts, self.inside = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        reads = any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)
        if not self.inside and not reads and "view" not in func.__name__:
            self.counts[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def mode(monkeypatch):
    """Counts while it is entered: launches of our kernels, and torch's operations beside them."""
    mode = Operations()
    for (where, name), launches in KERNELS.items():
        kernel = getattr(where, name)

        def call(*args, real=kernel, launches=launches, **kwargs):
            mode.counts["launch"] += launches * (not mode.inside)
            mode.inside += 1
            try:
                return real(*args, **kwargs)
            finally:
                mode.inside -= 1

        monkeypatch.setattr(where, name, call)
    return mode


def operations(mode, monkeypatch, level, family, **changes):
    """Of the median step or pass of an answer."""
    numbers, score = [], level.score

    def counted(self, *args):
        mode.counts.clear()
        with mode:
            logits = score(self, *args)
        numbers.append(mode.counts.total())
        return logits

    monkeypatch.setattr(level, "score", counted)
    model = tiny_model(family, calm=True, **changes).to(torch.bfloat16)
    with TriForce(model, **TREE) as engine:
        engine.generate(prompt_ids(200), max_new_tokens=6, do_sample=False)
    monkeypatch.setattr(level, "score", score)
    return sorted(numbers)[len(numbers) // 2]


def of_a_layer(mode, monkeypatch, level, family, kind=None):
    """What one more layer adds."""
    changes = [{"num_hidden_layers": number} for number in (2, 3)]
    if kind is not None:
        both = ["linear_attention", "full_attention"]
        kinds = both, [*both, kind]
        changes = [{"num_hidden_layers": len(each), "layer_types": each} for each in kinds]
    fewer, more = (operations(mode, monkeypatch, level, family, **change) for change in changes)
    return more - fewer


ATTENTION = {"llama": None, "qwen3": None, "qwen3.5": "full_attention"}


@pytest.mark.parametrize("family", ATTENTION)
def test_operations_of_a_layer_that_attends(mode, monkeypatch, family):
    counted = of_a_layer(mode, monkeypatch, RetrievalLevel, family, ATTENTION[family])
    planned = host_work.attention_operations(tiny_model(family).config.get_text_config().model_type)
    assert abs(counted - planned) <= host_work.SLACK, counted


@pytest.mark.parametrize("level", [RetrievalLevel, TargetLevel])
def test_operations_of_a_recurrent_layer(mode, monkeypatch, level):
    counted = of_a_layer(mode, monkeypatch, level, "qwen3.5", "linear_attention")
    assert abs(counted - host_work.RECURRENT) <= host_work.SLACK, counted


@pytest.mark.parametrize("choosing", [False, True])
def test_what_a_pass_adds_to_each_layer(mode, monkeypatch, choosing):
    """Beside the tiles: choosing looks at what is held, and at the tail."""
    tiles, begin = [], TileStream.begin
    monkeypatch.setattr(TileStream, "begin", lambda self, count: tiles.append(count) or begin(self, count))
    monkeypatch.setitem(TREE, "refresh", choosing)
    if not choosing:
        monkeypatch.setitem(TREE, "gamma", 0)
        monkeypatch.setitem(TREE, "draft_tokens", 0)
    counted = of_a_layer(mode, monkeypatch, TargetLevel, "llama")
    assert len({*tiles}) == 1
    launches = host_work.LAUNCHES_CHOOSING if choosing else host_work.LAUNCHES_PLAIN
    planned = host_work.PLAIN + host_work.CHOOSING * choosing + tiles[0] * launches
    assert tiles[0] > 1
    assert abs(counted - planned) <= host_work.SLACK, counted


@pytest.mark.parametrize("coded", [False, True])
def test_calls_of_the_driver_for_each_tile(monkeypatch, coded):
    """What another tile adds to a pass on a CUDA device, beside the kernels."""
    calls = Counter()

    def note(name, real):
        return lambda *args, **kwargs: calls.update([name]) or real(*args, **kwargs)

    cuda = FakeCuda(monkeypatch, seed=1)
    monkeypatch.setattr(torch.Tensor, "copy_", note("copy", torch.Tensor.copy_))
    monkeypatch.setattr(ops, "wire_decode", lambda *_: calls.update(["decode"]))
    wire = WireFormat(1, 64, 16, torch.bfloat16).bytes if coded else 0
    for name in ("record_event", "wait_event"):
        monkeypatch.setattr(FakeStream, name, note(name, getattr(FakeStream, name)))
    numbers = []
    for tiles in (4, 9):
        device = FakeCudaDevice(cuda)
        plan = TilePlan(1, 1, head_dim=16, itemsize=2, tile_tokens=64, tiles=tiles, ring=2, coded_bytes=wire)
        stream = TileStream(TileStore(plan, torch.bfloat16, device), device, torch.bfloat16)
        cuda.drain()
        calls.clear()
        stream.begin(tiles)
        for _ in stream.tiles(0):
            pass
        device.finish()  # what was issued is done
        numbers.append(calls.copy())
    added = {name: (numbers[1][name] - numbers[0][name]) / 5 for name in numbers[1]}
    assert added == {"copy": 1, "record_event": 3, "wait_event": 2, **({"decode": 1} if coded else {})}
    planned = host_work.tile_seconds(choosing=False, coded=coded)[1]
    assert planned == pytest.approx(sum(added.values()) * host_work.CALL)
