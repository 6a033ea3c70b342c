"""Where a draft with a streaming cache should begin to read: at the start of the text, or of its window.

SmolLM2-135M-Instruct is its own draft here, with a streaming cache of 256 tokens, on about 6,000 tokens of
standard-library source and an answer that the target itself drew at temperature 1. Reported is the overlap of the
draft's and the target's distribution, sum(min(p, q)), which is the probability that a drafted token is accepted.

    python -m benchmarks.streaming_positions [--answer-tokens 256] [--json FILE]
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
from offload_triforce.bench.texts import demo_prompt
from offload_triforce.cache.streaming import StreamingCache
from offload_triforce.model.adapter import attached, run
from offload_triforce.model.fetch import fetch_model
from offload_triforce.model.rotary import KeyTurner

SINK = 4
BLOCK = 16  # tokens per step while the whole text is read


def streaming(model, tokens: list[int], start: int, capacity: int, whole: bool) -> Tensor:
    """Distributions after each token from ``start`` on. ``whole``: read the text from its very beginning."""
    config = model.config
    shape = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim, capacity, SINK)
    cache = StreamingCache(*shape, KeyTurner(model).turn, model.dtype, model.device)
    rows = []
    if whole:
        steps = [tokens[i : min(i + BLOCK, start)] for i in range(0, start, BLOCK)]
    else:
        steps = [[token for part in cache.begin(start) for token in tokens[part.start : part.stop]]]
    for step in steps + [[token] for token in tokens[start:]]:
        cache.make_room(len(step))
        rows.append(run(model, step, cache.length, cache, keep=1))
        cache.end_step(len(step))
        cache.settle(len(step))
    return torch.softmax(torch.cat(rows[len(steps) :]), dim=-1)


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
    engine = TriForce.load(fetch_model("smollm2"))
    model, prompt = engine.model, demo_prompt(engine, options.prompt_tokens)
    answer = engine.generate(prompt, max_new_tokens=options.answer_tokens, temperature=1.0, seed=1).token_ids
    tokens, start = prompt + answer, len(prompt) - 1
    p = full(model, tokens, start)
    results = {}
    with attached(model):
        for name, whole in (("whole text (StreamingLLM)", True), ("window only (ours)", False)):
            began = time.perf_counter()
            overlap = torch.minimum(p, streaming(model, tokens, start, options.capacity, whole)).sum(dim=-1)
            results[name] = {
                "acceptance": overlap.mean().item(),
                "standard_error": (overlap.std() / len(overlap) ** 0.5).item(),
                "seconds": time.perf_counter() - began,
            }
            print(f"{name:26} acceptance {results[name]['acceptance']:.3f} +- {results[name]['standard_error']:.3f}, "
                  f"{results[name]['seconds']:.0f} s with reading the prompt")  # fmt: skip
    if options.json:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        about = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        settings = {k: v for k, v in vars(options).items() if k != "json"}
        options.json.write_text(json.dumps({**settings, **versions, **about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
