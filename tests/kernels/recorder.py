"""A driver for Triton that launches nothing and writes down what it was asked to: kernels compile, but need no GPU.

Run as a program, it prints what a pass over tiles launches, as JSON: kernels compile in a process of their own, since
in that of the tests they may belong to the interpreter.
"""

from __future__ import annotations

import gc
import itertools
import json
import sys
import weakref
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from offload_triforce.cache.full import FullCache
from offload_triforce.cache.retrieval import RetrievalCache, RetrievalShape
from offload_triforce.kernels import launch, ops, tile_choice, verify_attention, wire_codec
from offload_triforce.kernels.wire_format import WireFormat
from offload_triforce.scheduler.pipeline import TileStream
from offload_triforce.scheduler.plan import TilePlan
from offload_triforce.scheduler.store import TileStore
from tests.scheduler.devices import EagerDevice

LAYERS, KV_HEADS, GROUP, DIM, TILE, CHUNK, TOKENS = 2, 2, 2, 64, 64, 8, 5


class Recorder(DriverBase):
    """``launches``: of each, the name of the kernel, the grid and the arguments, with addresses for tensors.

    ``aligned``: of each, the parameters that were compiled for multiples of 16.
    """

    def __init__(self):
        self.launches, self.aligned = [], []
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 101376},
            load_binary=lambda name, binary, shared, device: (1, name, 0, 0, 1024),
            unload_module=lambda module: None,
        )
        self.launcher_cls = self.launcher
        self.get_current_device, self.get_current_stream = (lambda: 0), (lambda device: 7)

    def launcher(self, source, metadata):
        """What stands between a compiled kernel and the driver."""

        def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            assert (stream, packed) == (7, (metadata.num_warps, metadata.num_ctas, metadata.shared))
            plain = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in arguments]
            self.launches.append((function, (x, y, z), plain))
            self.aligned.append([source.fn.arg_names[place] for (place, *_), hints in source.attrs.items() if hints])

        return launch

    def get_current_target(self):
        return GPUTarget("cuda", 89, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_benchmarker(self):
        return None

    @staticmethod
    def is_active():
        return True


class Rig:
    """A full cache and a retrieval cache on the CPU, through which passes go without anything being computed."""

    def __init__(self, recorder, tiles, coded=False):
        device, dtype = EagerDevice(), torch.bfloat16
        wire = WireFormat(KV_HEADS, TILE, DIM, dtype).bytes if coded else 0
        plan = TilePlan(LAYERS, KV_HEADS, DIM, 2, TILE, tiles, ring=4, coded_bytes=wire)
        stream = TileStream(TileStore(plan, dtype, device), device, dtype)
        shape = RetrievalShape(160, CHUNK, CHUNK, CHUNK, 4)
        self.recorder = recorder
        self.full = FullCache(stream, shape.tail_needed(TOKENS), TOKENS, TOKENS, dtype, torch.device("cpu"))
        self.near = RetrievalCache(
            LAYERS, KV_HEADS, DIM, shape, TOKENS, TOKENS, dtype, torch.device("cpu"), context=(tiles + 2) * TILE
        )
        self.full.tiles, self.full.tail.length = tiles, 40
        self.kept = []  # so that no address is used twice
        self.query = torch.zeros(GROUP * KV_HEADS, TOKENS, DIM, dtype=dtype)
        self.key = torch.zeros(KV_HEADS, TOKENS, DIM, dtype=dtype)

    def draft(self):
        """One step of the retrieval level over a full retrieval cache: what it launched."""
        self.recorder.launches.clear()
        for layer in range(LAYERS):
            arguments = (layer, self.query, self.key, self.key, ops.AttentionParams(0.125))
            self.kept.append(self.near.attend_draft(*arguments))
        return list(self.recorder.launches)

    def run(self, refresh):
        """One pass: what it launched."""
        self.recorder.launches.clear()
        self.full.begin_step()
        for layer in range(LAYERS):

            def observe(packed, baseline, scaling, layer=layer):
                self.kept.append(baseline)
                return self.near.refresh(layer, packed, baseline, scaling, self.full.length)

            arguments = (layer, self.query, self.key, self.key, ops.AttentionParams(0.125))
            self.kept.append(self.full.attend(*arguments, observe if refresh else None))
        self.full.end_step(TOKENS)
        self.full.select([])
        return list(self.recorder.launches)


def calls_of(work):
    """Calls of Python functions in our kernels and in Triton."""
    count = 0

    def notice(frame, event, argument):
        nonlocal count
        count += event == "call" and frame.f_globals.get("__name__", "").startswith(
            ("offload_triforce.kernels", "triton")
        )

    sys.setprofile(notice)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def per_tile(recorder, coded, count):
    """What one tile adds to ``count``, a number per rig, in a pass that is not the first."""
    numbers = []
    for tiles in (4, 8):
        rig = Rig(recorder, tiles, coded)
        for refresh in (True, False, True):
            rig.run(refresh)
        numbers.append(count(rig))
    return (numbers[1] - numbers[0]) / (4 * LAYERS)


class TritonsWay(launch.Bound):
    """The same launches, each of them in Triton's own way, as under the interpreter."""

    def __init__(self, made, changing, lasting=()):
        super().__init__(made, changing, lasting)
        self._launch, self._arguments = made, list(made.arguments)


def numbered(launches):
    """The launches with each address replaced by the number of others that were seen before it."""
    seen = {}
    return [
        [
            name,
            grid,
            [seen.setdefault(x, f"address {len(seen)}") if isinstance(x, int) and x > 1 << 32 else x for x in of],
        ]
        for name, grid, of in launches
    ]


def per_layer(recorder, count):
    """What one layer adds to ``count`` in a step of the retrieval level that is not the first."""
    rig = Rig(recorder, 4)
    rig.run(True)
    rig.near.filled = 8
    for _ in range(2):
        rig.draft()
    return count(rig) / LAYERS


def fetches(recorder):
    """Small tensors read out of one place of host memory, again and again: launches, and whether it is from there."""
    host, targets = torch.zeros(2500, dtype=torch.long), [torch.zeros(2500, dtype=torch.long) for _ in range(4)]
    found = []
    for target in targets:
        recorder.launches.clear()
        ops.fetch(target, host)
        ((_, grid, (source, there, count, _)),) = recorder.launches
        found.append((grid, source == host.data_ptr(), there == target.data_ptr(), count))
    return found, calls_of(lambda: ops.fetch(targets[0], host))


def unaligned(recorder):
    """For which alignment a tile is attended to and chosen from: aligned, bound as such, then four bytes further."""
    attention, choice = ops.RunningAttention(), ops.RunningChoice()
    attention.start(torch.zeros(2, 3, DIM, dtype=torch.float32), 1, ops.AttentionParams(0.1))
    memory, shape = torch.zeros(2 * TILE * DIM + 16), (2, 1, TILE, DIM)
    tiles = [memory[start:][: 2 * TILE * DIM].view(shape) for start in (0, 0, 0, 1)]
    empty = torch.zeros(1, 4), torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 99, dtype=torch.bool)
    store, baseline = torch.zeros(2, 1, 4, CHUNK, DIM), torch.zeros(1, 6)
    choice.start(attention.packed, baseline, 0.1, CHUNK, ops.ChunkSelection(*empty), store)
    found = []
    for tile in tiles:
        recorder.aligned.clear()
        attention.update_tile(tile)
        choice.see(0, tile)
        found.append([any(name in ("key", "kv") for name in names) for names in recorder.aligned])
    return found


def let_go():
    """Whether a tile that attention and choice have taken in again and again is free as soon as nobody else has it."""
    attention, choice = ops.RunningAttention(), ops.RunningChoice()
    attention.start(torch.zeros(2, 3, DIM), 1, ops.AttentionParams(0.1))
    tile = torch.zeros(2, 1, TILE, DIM)
    attention.update(tile[0], tile[1])
    empty = torch.zeros(1, 4), torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 99, dtype=torch.bool)
    arguments = torch.zeros(1, 6), 0.1, CHUNK, ops.ChunkSelection(*empty), torch.zeros(2, 1, 4, CHUNK, DIM)
    choice.start(attention.packed, *arguments)
    for _ in range(3):
        attention.update_tile(tile)
        choice.see(0, tile)
    seen = weakref.ref(tile)
    del tile
    return seen() is None


def scratch():
    """Whether all that a choice allocates when it is bound is there as long as its addresses are launched with."""
    made, allocate = [], torch.empty

    def remembered(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        made.append(weakref.ref(tensor))
        return tensor

    choice, packed = ops.RunningChoice(), torch.zeros(1, 6, DIM)
    empty = torch.zeros(1, 4), torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 99, dtype=torch.bool)
    store, tile = torch.zeros(2, 1, 4, CHUNK, DIM), torch.zeros(2, 1, TILE, DIM)
    choice.start(packed, torch.zeros(1, 6), 0.1, CHUNK, ops.ChunkSelection(*empty), store)
    with mock.patch("torch.empty", remembered):
        choice.see(0, tile)
    choice.see(0, tile)
    gc.collect()
    return [tensor() is not None for tensor in made]


def whole_pass(recorder, coded):
    """What the second one launches."""
    rig = Rig(recorder, 4, coded)
    rig.run(True)
    return numbered(rig.run(True))


def main():
    recorder = Recorder()
    triton.runtime.driver.set_active(recorder)
    report = {"aligned": unaligned(recorder), "scratch": scratch(), "let go": let_go()}
    report["launches draft"] = per_layer(recorder, lambda rig: len(rig.draft()))
    report["calls draft"] = per_layer(recorder, lambda rig: calls_of(rig.draft))
    report["fetches"], report["calls fetch"] = fetches(recorder)
    for coded, refresh in itertools.product((True, False), repeat=2):
        name = f"{'coded' if coded else 'raw'} {'refresh' if refresh else 'plain'}"
        report[f"launches {name}"] = per_tile(recorder, coded, lambda rig, refresh=refresh: len(rig.run(refresh)))
        report[f"calls {name}"] = per_tile(
            recorder, coded, lambda rig, refresh=refresh: calls_of(lambda: rig.run(refresh))
        )
    report["bound"] = [whole_pass(recorder, coded) for coded in (True, False)]
    wire_codec._BOUND.clear()
    for module in (tile_choice, verify_attention, wire_codec):
        module.Bound = TritonsWay
    report["triton"] = [whole_pass(recorder, coded) for coded in (True, False)]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
