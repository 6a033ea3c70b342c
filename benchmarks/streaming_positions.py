"""How to give positions to a draft's streaming cache: StreamingLLM's way against refilling.

SmolLM2-135M-Instruct is its own draft here, with a streaming cache of 256 tokens, on about 6,000 tokens of
standard-library source and an answer that the target itself drew at temperature 1. Reported is the overlap of the
draft's and the target's distribution, sum(min(p, q)), which is the probability that a drafted token is accepted.

    python benchmarks/streaming_positions.py [--answer-tokens 256] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch
import transformers
from torch import Tensor

from offload_triforce import TriForce
from offload_triforce.cache.buffer import GrowingBuffer
from offload_triforce.cache.streaming import StreamingCache
from offload_triforce.demo import demo_prompt
from offload_triforce.fetch import fetch_smollm2
from offload_triforce.model.adapter import attached, run

SINK = 4
BLOCK = 16  # tokens per step while StreamingLLM reads the prompt


class RollingCache(GrowingBuffer):
    """StreamingLLM's cache (arXiv 2309.17453): whoever stays is rotated to close the gap that eviction leaves."""

    def __init__(self, model, capacity):
        config = model.config
        super().__init__(
            config.num_hidden_layers,
            config.num_key_value_heads,
            capacity,
            config.head_dim,
            model.dtype,
            model.device,
        )
        self.rotary = model.model.rotary_emb

    def make_room(self, tokens: int) -> None:
        evicted = self.length + tokens - self.capacity
        if evicted <= 0:
            return
        stay = self.kv[:, :, :, SINK + evicted : self.length].clone()
        cos, sin = self.rotary(stay, torch.tensor([[-evicted]]))
        keys = stay[:, 0]
        turned = torch.cat([-keys[..., keys.shape[-1] // 2 :], keys[..., : keys.shape[-1] // 2]], dim=-1)
        stay[:, 0] = keys * cos + turned * sin
        self.length -= evicted
        self.kv[:, :, :, SINK : self.length] = stay


def rolling(model, tokens: list[int], start: int, capacity: int) -> Tensor:
    """Distributions after each token from ``start`` on, the whole text having been read through the cache."""
    cache, rows = RollingCache(model, capacity), []
    steps = [tokens[i : min(i + BLOCK, start)] for i in range(0, start, BLOCK)] + [[t] for t in tokens[start:]]
    for step in steps:
        cache.make_room(len(step))
        rows.append(run(model, step, cache.length, cache, keep=1))
        cache.end_step(len(step))
    return torch.softmax(torch.cat(rows[-len(tokens) + start :]), dim=-1)


def refilling(model, tokens: list[int], start: int, capacity: int) -> Tensor:
    """The same with the project's own cache: sink and window are read afresh whenever it is full."""
    config = model.config
    cache = StreamingCache(
        config.num_hidden_layers,
        config.num_key_value_heads,
        config.head_dim,
        capacity,
        SINK,
        model.dtype,
        model.device,
    )
    rows = []
    for end in range(start + 1, len(tokens) + 1):
        step = tokens[cache.text : end]
        if cache.length + len(step) > capacity:
            step = [t for part in cache.refill(end) for t in tokens[part.start : part.stop]]
        rows.append(run(model, step, cache.length, cache, keep=1))
        cache.end_step(len(step))
        cache.settle(cache.pending)
    return torch.softmax(torch.cat(rows), dim=-1)


def full(model, tokens: list[int], start: int) -> Tensor:
    """The target's own distributions, by a plain transformers forward pass."""
    keep = len(tokens) - start
    output = model(torch.tensor([tokens]), use_cache=False, logits_to_keep=keep)
    return torch.softmax(output.logits[0], dim=-1)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=6000)
    parser.add_argument("--answer-tokens", type=int, default=256)
    parser.add_argument("--capacity", type=int, default=256)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    engine = TriForce.load(fetch_smollm2())
    model, prompt = engine.model, demo_prompt(engine, options.prompt_tokens)
    answer = engine.generate(prompt, max_new_tokens=options.answer_tokens, temperature=1.0, seed=1).token_ids
    tokens, start = prompt + answer, len(prompt) - 1
    p = full(model, tokens, start)
    results = {}
    with attached(model):
        for name, draft in (("rolling (StreamingLLM)", rolling), ("refilling (ours)", refilling)):
            began = time.perf_counter()
            overlap = torch.minimum(p, draft(model, tokens, start, options.capacity)).sum(dim=-1)
            results[name] = {
                "acceptance": overlap.mean().item(),
                "standard_error": (overlap.std() / len(overlap) ** 0.5).item(),
                "seconds": time.perf_counter() - began,
            }
            print(f"{name:24} acceptance {results[name]['acceptance']:.3f} +- {results[name]['standard_error']:.3f}, "
                  f"{results[name]['seconds']:.0f} s with reading the prompt")  # fmt: skip
    if options.json:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        about = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        settings = {k: v for k, v in vars(options).items() if k != "json"}
        options.json.write_text(json.dumps({**settings, **versions, **about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
