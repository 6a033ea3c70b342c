"""What the server costs: the same answer from the engine alone and through HTTP, in turns in the same run.

One engine, one real model, one long text that is read once before anything is timed. In each round every question is
answered twice: by ``engine.stream`` in a thread of its own, like the server's answers, and by the server on top of the
same engine (in a thread of this process, as ``offload-triforce serve`` runs it) for a client in a process of its own,
over a loopback connection, by server-sent events. Both orders take turns. Answers must be the same text.

The whole time counts, from the question to the last piece: reading what is new of the prompt, waiting for the turn,
decoding, spelling, JSON, the connection. Ratios are of tokens per second, server over engine, of each pair; the median
counts.

    python -m benchmarks.server_overhead [--model smollm2] [--tokens 4000] [--new 64] [--repeats 6] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from offload_triforce import TriForce
from offload_triforce.bench.tasks import find_task, prompts
from offload_triforce.machine.describe import describe_machine
from offload_triforce.model.fetch import fetch_model
from offload_triforce.server.app import make_app
from offload_triforce.server.options import ServerOptions
from offload_triforce.server.serving import in_background

TASKS = ("explain", "edit")  # of one text, which is read once


def ask(address: str, prompt: list[int], new_tokens: int) -> tuple[float, int, str]:
    """Seconds, new tokens and text of an answer by a client; to be called in a process of its own."""
    body = {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    pieces, tokens = [], 0
    started = time.perf_counter()
    with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=600) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            pieces += [choice["text"] for choice in chunk["choices"]]
            if chunk.get("usage"):
                tokens = chunk["usage"]["completion_tokens"]
    return time.perf_counter() - started, tokens, "".join(pieces)


def ask_engine(engine: TriForce, prompt: list[int], new_tokens: int) -> tuple[float, int, str]:
    """The same of the engine alone."""
    started = time.perf_counter()
    with engine.stream(prompt, do_sample=False, max_new_tokens=new_tokens) as stream:
        text = "".join(stream)
    return time.perf_counter() - started, stream.stats.new_tokens, text


def measure(engine: TriForce, questions: dict[str, list[int]], new_tokens: int, repeats: int) -> dict[str, Any]:
    """Both ways of every question, in turns.

    Raises:
        RuntimeError: the two gave different answers, or different numbers of tokens.
    """
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in questions}
    counts = {}
    context = multiprocessing.get_context("spawn")
    options = ServerOptions(names=("model",), port=0, grace_seconds=2.0)
    background = in_background(make_app(engine, options), options)
    with background as address, ProcessPoolExecutor(1, context) as pool, ThreadPoolExecutor(1) as threads:
        for turn in range(-1, repeats):  # the first warms up: connections, imports, caches
            for name, prompt in questions.items():
                ways = {
                    "engine": lambda prompt=prompt: threads.submit(ask_engine, engine, prompt, new_tokens).result(),
                    "server": lambda prompt=prompt: pool.submit(ask, address, prompt, new_tokens).result(),
                }
                order = ["engine", "server"] if turn % 2 else ["server", "engine"]
                found = {way: ways[way]() for way in order}
                if found["engine"][1:] != found["server"][1:]:
                    raise RuntimeError(f"{name}: the server's answer is not the engine's: {found}")
                counts[name] = found["engine"][1]
                if turn >= 0:
                    pairs[name].append((found["engine"][0], found["server"][0]))
    ratios = [own / served for found in pairs.values() for own, served in found]
    return {
        "machine": describe_machine(),
        "loadavg": os.getloadavg(),
        "prompt_tokens": {name: len(prompt) for name, prompt in questions.items()},
        "new_tokens": counts,
        "seconds": {
            name: {"engine": [a for a, _ in found], "server": [b for _, b in found]} for name, found in pairs.items()
        },
        "server_over_engine": {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=4000, help="of the text that is asked about")
    parser.add_argument("--new", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with TriForce.load(fetch_model(args.model), "ngram", "float32") as engine:
        tasks = [find_task(name) for name in TASKS]
        questions = {task.name: ids for task, ids in prompts(engine.tokenizer, tasks, args.tokens).items()}
        report = measure(engine, questions, args.new, args.repeats)
    report |= {
        "model": args.model,
        "command": f"python -m benchmarks.server_overhead --model {args.model} --tokens {args.tokens} --new {args.new}",
    }
    for name, seconds in report["seconds"].items():
        own, served = (report["new_tokens"][name] / statistics.median(seconds[way]) for way in ("engine", "server"))
        print(f"{name}: {own:.2f} tokens/s from the engine, {served:.2f} through the server")
    found = report["server_over_engine"]
    print(f"server / engine: {found['median']:.3f} ({found['least']:.3f} to {found['most']:.3f})")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
