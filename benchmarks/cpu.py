"""What a CPU without a link takes for each piece of work, before and after: ``python -m benchmarks.cpu``.

In turns, in one run: tiles copied into a ring ("copied", as with a link of no length) and attended to where they lie
("in place"), each with the eager twins alone ("torch") and with the compiled loops ("compiled"); and transformers' own
step of one token. Times are CPU seconds of the whole process, which other programs disturb little, and by the clock.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from offload_triforce.bench.subject import Subject
from offload_triforce.config import Settings
from offload_triforce.kernels.cpu import CHOICE
from offload_triforce.model.fetch import find_source
from offload_triforce.model.loader import load_model
from offload_triforce.scheduler.device import Device
from offload_triforce.scheduler.emulated import EmulatedDevice
from offload_triforce.scheduler.host import HostDevice

PLACES: dict[str, Callable[[], Device]] = {"copied": EmulatedDevice, "in place": HostDevice}
LOOPS = ("torch", "compiled")
PIECES = (("step", 1), ("step", 12), ("pass", 1), ("pass", 13), ("pass", 193))


def measure(model: PreTrainedModel, tokens: int, turns: int, prefill: bool = True) -> dict[str, dict[str, float]]:
    """Milliseconds, the least of ``turns``: by the piece of work and the way, of CPU time and by the clock.

    The caches hold ``tokens`` random tokens. ``prefill``: read them, too.
    """
    text = torch.arange(tokens) % model.config.get_text_config().vocab_size
    found: dict[str, list[tuple[float, float]]] = {}
    with contextlib.ExitStack() as stack:
        subjects = {name: Subject(model, Settings(graphs=False), text, make()) for name, make in PLACES.items()}
        for name, subject in subjects.items():
            stack.callback(subject.close)
            if prefill:
                found[f"prefill, {name}"] = [_timed(subject.read)]
            subject.fill()
        theirs = _their_step(model, tokens)
        for turn in range(turns + 1):
            for name, subject in subjects.items():
                for loops in LOOPS:
                    with _choosing(loops):
                        for kind, count in PIECES:
                            work = subject.draft if kind == "step" else subject.verify
                            took = _timed(lambda work=work, count=count: work(count))
                            if turn:  # the first one warms up
                                found.setdefault(f"{kind} of {count}, {name}, {loops}", []).append(took)
            took = _timed(theirs)
            if turn:
                found.setdefault("step of 1, transformers", []).append(took)
    return {
        piece: {"cpu_ms": 1e3 * min(cpu for cpu, _ in times), "wall_ms": 1e3 * statistics.median(w for _, w in times)}
        for piece, times in found.items()
    }


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of CPU time, and by the clock."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def _their_step(model: PreTrainedModel, tokens: int) -> Callable[[], object]:
    """transformers' own step of one token over a cache of its own, which it makes longer by one each time."""
    config = model.config.get_text_config()
    heads = config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        cache.update(*torch.randn(2, 1, heads, tokens - 1, dim, dtype=model.dtype), layer)

    @torch.no_grad()
    def step() -> object:
        return model(input_ids=torch.tensor([[1]]), past_key_values=cache, use_cache=True)

    return step


@contextlib.contextmanager
def _choosing(loops: str) -> Iterator[None]:
    """With the eager twins alone, or with the compiled loops where there are any."""
    before = os.environ.pop(CHOICE, None)
    if loops == "torch":
        os.environ[CHOICE] = "torch"
    try:
        yield
    finally:
        os.environ.pop(CHOICE, None)
        if before is not None:
            os.environ[CHOICE] = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--no-prefill", action="store_true")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    model = load_model(find_source(asked.model), torch.float32, torch.device("cpu"))[0]
    found: dict[str, Any] = measure(model, asked.tokens, asked.turns, not asked.no_prefill)
    if asked.json:
        print(json.dumps({"threads": torch.get_num_threads(), "tokens": asked.tokens, "found": found}))
        return
    print(f"{asked.model}, {asked.tokens:,} tokens, {torch.get_num_threads()} threads: ms of CPU time, ms by the clock")
    for piece, times in found.items():
        print(f"{piece:32} {times['cpu_ms']:10.1f} {times['wall_ms']:10.1f}")


if __name__ == "__main__":
    main()
