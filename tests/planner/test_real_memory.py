"""What is predicted against what a run really takes, in a process of its own: resident memory on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# Keys and values outweigh everything else: 6 layers, 16 KV heads of 64.
CHILD = """
import ctypes, gc, json, sys, threading, time
import psutil, torch
from transformers import LlamaConfig, LlamaForCausalLM
from offload_triforce import Settings, TriForce
from offload_triforce.model.shape import shape_of
from offload_triforce.planner.fit import DEVICE_OVERHEAD, HOST_OVERHEAD, footprint

torch.set_num_threads(1)
config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=16, head_dim=64,
                     num_key_value_heads=16, vocab_size=256, max_position_embeddings=20000, eos_token_id=None)
model, settings, tokens, new = LlamaForCausalLM(config).eval(), Settings(tile=512), int(sys.argv[1]), 8

def answer(prompt):
    with TriForce(model, settings=settings) as engine:
        engine.generate(torch.arange(prompt) % 250, max_new_tokens=new, do_sample=False)

answer(1500)  # libraries, threads and their buffers are there
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
planned = used.vram_bytes + used.host_bytes - DEVICE_OVERHEAD - HOST_OVERHEAD - used.device["weights"]
print(json.dumps({"planned": planned, "taken": peak - before}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts on the C library giving memory back")
def test_planned_memory_is_what_a_run_takes():
    """To 5 %: tiles, ring, tail, retrieval cache, and the most that the prefill holds beside them."""
    command = [sys.executable, "-c", CHILD, "6000"]
    # The C library gives freed blocks of this size back at once, instead of keeping what it may need again.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=400, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["taken"] == pytest.approx(found["planned"], rel=0.05)
