"""What is predicted against what a run really takes, in a process of its own: resident memory on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# Keys and values outweigh everything else: 9 layers, 16 KV heads of 64.
CHILD = """
import ctypes, gc, json, sys, threading, time
import psutil, torch
from transformers import LlamaConfig, LlamaForCausalLM
from offload_triforce import Settings, TriForce
from offload_triforce.model.shape import shape_of
from offload_triforce.planner.fit import DEVICE_OVERHEAD, HOST_OVERHEAD, footprint
from offload_triforce.scheduler.emulated import EmulatedDevice

torch.set_num_threads(1)
config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=9, num_attention_heads=16, head_dim=64,
                     num_key_value_heads=16, vocab_size=256, max_position_embeddings=20000, eos_token_id=None)
# Little scratch memory, which CPUs need for attention and packing and fused kernels do not: short steps, 16 bits.
# With a link, whose ring and resident tiles a CPU without one has not.
small = {"tile": 128, "prefill_chunk": 128, "bits": 16, "gamma": 8, "topk": 1, "link_gbps": 1000.0}
settings, tokens, new = Settings(**small, **json.loads(sys.argv[2])), int(sys.argv[1]), 8
model = LlamaForCausalLM(config).eval()

def touched(self, shape, dtype):
    return torch.empty(shape, dtype=dtype).fill_(0)  # as pinning does with host memory: all of it is there

EmulatedDevice.empty = EmulatedDevice.host_empty = touched

def answer(prompt):
    with TriForce(model, settings=settings) as engine:
        engine.generate(torch.arange(prompt) % 250, max_new_tokens=new, do_sample=False)

answer(700)  # libraries, threads and their buffers are there
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
process, done = psutil.Process(), threading.Event()
before = peak = process.memory_info().rss

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
answer(tokens)
done.set()
watcher.join()
used = footprint(shape_of(config, torch.float32), settings, tokens + new)
weights = used.held["weights"] + used.host.get("input embeddings", 0)  # were there before
planned = used.vram_bytes + used.host_bytes - DEVICE_OVERHEAD - HOST_OVERHEAD - weights
print(json.dumps({"planned": planned, "taken": peak - before}))
"""


WAYS = [
    {},  # most is held while the prompt is read
    {"resident": 0.5, "prefill_resident": 0.0},  # and here while decoding
    pytest.param({"resident": 0.4, "prefill_resident": 0.2, "hidden_states": "host"}, marks=pytest.mark.slow),
]


@pytest.mark.skipif(sys.platform != "linux", reason="counts on the C library giving memory back")
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_planned_memory_is_what_a_run_takes(way):
    """To 2 %: tiles, ring, tail, retrieval cache, and the most that prefill or decoding hold beside them."""
    command = [sys.executable, "-c", CHILD, "2000", json.dumps(way)]
    # The C library gives freed blocks of this size back at once, instead of keeping what it may need again.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "32768", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=400, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["taken"] == pytest.approx(found["planned"], rel=0.02)
