"""How long the host works for each tile of a pass, with Triton's real launcher over a driver that does nothing.

No GPU is needed, but a C compiler: it builds a ``libcuda.so.1`` whose calls return at once. Everything else is what
a run has: compiled kernels, their launcher in C, the caches, the store, the ring and the lanes. Streams and events are
empty objects, and no tile is copied. So what a real driver takes for itself comes on top, and everything that Python
takes is in. A pass over many tiles and one over few are timed in turns, by the thread's own time; the least counts.

    python -m benchmarks.host_time [--json FILE] [--repeat 25]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver

from offload_triforce.cache.full import FullCache
from offload_triforce.cache.retrieval import RetrievalCache, RetrievalShape
from offload_triforce.kernels import ops
from offload_triforce.kernels.wire_format import WireFormat
from offload_triforce.scheduler.device import CudaDevice
from offload_triforce.scheduler.pipeline import TileStream
from offload_triforce.scheduler.plan import TilePlan
from offload_triforce.scheduler.store import TileStore

# What Triton's launcher asks of a driver: a card of 128 multiprocessors, with 99 KB of shared memory for a block.
STUB = """
#include <stddef.h>
typedef unsigned u; typedef void *p; typedef unsigned long long a;
static long count;
long launches(void) { return count; }
int cuLaunchKernelEx(p config, p kernel, p *values, p *more) { count++; return 0; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuDriverGetVersion(int *n) { *n = 13000; return 0; }
int cuDeviceGet(int *device, int number) { *device = 0; return 0; }
int cuDeviceGetAttribute(int *n, int what, int of) { *n = what == 16 ? 128 : what == 97 ? 101376 : 49152; return 0; }
int cuDevicePrimaryCtxRetain(p *context, int device) { *context = (p)1; return 0; }
int cuCtxGetCurrent(p *context) { *context = (p)1; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuCtxGetLimit(size_t *n, int what) { *n = 1 << 20; return 0; }
int cuFuncGetAttribute(int *n, int what, p kernel) { *n = what ? 64 : 1024; return 0; }
int cuModuleLoadData(p *module, const void *image) { *module = (p)1; return 0; }
int cuModuleGetFunction(p *kernel, p module, const char *name) { *kernel = (p)1; return 0; }
int cuOccupancyMaxActiveClusters(int *n, p kernel, p config) { *n = 1; return 0; }
int cuPointerGetAttribute(p data, int what, a address) { *(a *)data = address; return 0; }
int cuGetErrorString(int code, const char **text) { *text = "error"; return 0; }
int cuInit() { return 0; }
int cuCtxSetCurrent() { return 0; }
int cuCtxSetLimit() { return 0; }
int cuFuncSetAttribute() { return 0; }
int cuFuncSetCacheConfig() { return 0; }
int cuModuleUnload() { return 0; }
int cuStreamIsCapturing(p stream, int *n) { *n = 0; return 0; }
int cuLaunchKernel() { return 0; }
int cuTensorMapEncodeTiled() { return 0; }
"""

LAYERS, HEADS, KV_HEADS, DIM, TILE, NODES = 4, 32, 8, 128, 64, 13
FEW, MANY = 4, 36  # tiles per layer
FOLDER = "OFFLOAD_TRIFORCE_STUB"  # of the driver, in the process that measures


class Driver(CudaDriver):
    """Triton's own, on the stub, as of an RTX 4090."""

    def __init__(self) -> None:
        super().__init__()
        self.get_current_device, self.get_current_stream = (lambda: 0), (lambda device: 7)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 89, 32)


class Nothing:
    """A stream, and an event that is never reached."""

    device = torch.device("cuda", 0)

    def __init__(self, *_: object, **__: object) -> None: ...

    def record_event(self, event: Nothing | None = None) -> Nothing:
        return event or Nothing()

    def wait_event(self, event: Nothing) -> None: ...

    wait = synchronize = record = wait_event

    def query(self) -> bool:
        return False

    def elapsed_time(self, other: Nothing) -> float:
        return 0.01


def pass_of(tiles: int, coded: bool) -> Callable[[bool], None]:
    """A pass over so many tiles per layer, with a refresh or without."""
    device, dtype, cpu = CudaDevice(Nothing.device), torch.bfloat16, torch.device("cpu")
    device.empty = device.host_empty
    device.incoming._copy = lambda target, source: None
    wire = WireFormat(KV_HEADS, TILE, DIM, dtype).bytes if coded else 0
    plan = TilePlan(LAYERS, KV_HEADS, DIM, 2, TILE, tiles, ring=8, coded_bytes=wire)
    stream, shape = TileStream(TileStore(plan, dtype, device), device, dtype), RetrievalShape(8192, 8, 8, 64, 4)
    full = FullCache(stream, shape.tail_needed(49), NODES, 49, dtype, cpu)
    near = RetrievalCache(LAYERS, KV_HEADS, DIM, shape, 49, 2 * NODES, dtype, cpu, context=tiles * TILE + 500)
    full.tiles, full.tail.length = tiles, 120
    query, key = torch.zeros(HEADS, NODES, DIM, dtype=dtype), torch.zeros(KV_HEADS, NODES, DIM, dtype=dtype)

    def run(refresh: bool) -> None:
        full.begin_step()
        for layer in range(LAYERS):
            observe = (lambda *seen, of=layer: near.refresh(of, *seen, full.length)) if refresh else None
            full.attend(layer, query, key, key, ops.AttentionParams(DIM**-0.5), observe, None, lambda: None)
        full.end_step(NODES)
        full.select([])

    return run


def measure(repeat: int) -> list[dict[str, Any]]:
    """Of coded tiles and raw ones, with a refresh and without: microseconds and launches per tile."""
    torch.set_num_threads(1)
    torch.cuda.Stream = torch.cuda.Event = torch.cuda.current_stream = Nothing
    torch.cuda.current_device, torch.cuda.set_stream = (lambda: 0), (lambda stream: None)
    torch._C._cuda_getCurrentRawStream = lambda index: 7
    triton.runtime.driver.set_active(Driver())
    launches, found = ctypes.CDLL(f"{os.environ[FOLDER]}/libcuda.so.1").launches, []
    for coded in (True, False):
        passes = [pass_of(tiles, coded) for tiles in (FEW, MANY)]
        for refresh in (True, False):
            taken, made = ([[], []] for _ in range(2))
            for _ in range(3 + repeat):
                for number, run in enumerate(passes):
                    before, begun = launches(), time.thread_time()
                    run(refresh)
                    taken[number].append(time.thread_time() - begun)
                    made[number].append(launches() - before)
            few, many = (min(times[3:]) for times in taken)
            tiles = LAYERS * (MANY - FEW)
            found.append({"coded": coded, "refresh": refresh, "us_per_tile": round((many - few) / tiles * 1e6, 1)})
            found[-1]["launches_per_tile"] = (made[1][-1] - made[0][-1]) / tiles
    return found


def build(folder: str) -> None:
    """The driver that does nothing, under both names that it is looked for by."""
    source = Path(folder, "stub.c")
    source.write_text(STUB)
    library = Path(folder, "libcuda.so.1")
    subprocess.run([os.environ.get("CC", "cc"), "-w", "-shared", "-fPIC", source, "-o", library], check=True)
    Path(folder, "libcuda.so").symlink_to(library)


def main() -> None:
    """The command. The linker must know of the stub from the start: a process of its own measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--repeat", type=int, default=25, help="passes of each kind, of which the fastest counts")
    given = parser.parse_args()
    if FOLDER not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            build(folder)
            known = {FOLDER: folder, "TRITON_LIBCUDA_PATH": folder, "LD_LIBRARY_PATH": folder}
            known |= {"OFFLOAD_TRIFORCE_KERNELS": "triton", "TRITON_CACHE_DIR": f"{folder}/kernels"}
            kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
            command = [sys.executable, "-m", "benchmarks.host_time", *sys.argv[1:]]
            sys.exit(subprocess.run(command, env=kept | known, check=False).returncode)
    found = measure(given.repeat)
    for row in found:
        kind = f"{'coded' if row['coded'] else 'raw'} tile, {'with' if row['refresh'] else 'without'} refresh"
        print(f"{kind:30} {row['us_per_tile']:6.1f} us, {row['launches_per_tile']:g} launches")
    if given.json:
        versions = {"torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0]}
        Path(given.json).write_text(json.dumps({"versions": versions, "tiles": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
