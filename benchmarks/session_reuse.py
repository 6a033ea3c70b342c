"""A second question about a long text, from what the first has read: in the same process, and in another one.

SmolLM2 reads a text of Python's library and answers two questions about it, by a session of one engine. The session is
saved after the first answer; a process of its own loads it and is asked the second question too. And a third process
asks that question with nothing in hand. What counts is the time to the first token, and the bytes that cross the link
(an emulated one of 1,000 GB/s, which takes no time) before it. All answers to the second question must be the same.

    python -m benchmarks.session_reuse [--tokens 6000] [--new 32] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from offload_triforce import TriForce
from offload_triforce.bench.tasks import long_text
from offload_triforce.generation.answer import Generation
from offload_triforce.generation.prompt import build_prompt
from offload_triforce.machine.describe import describe_machine
from offload_triforce.model.fetch import fetch_model

MODEL = "smollm2"
FIRST = "Explain what this code does, function by function."
SECOND = "Which of these functions would you test first, and why?"


def load() -> TriForce:
    return TriForce.load(fetch_model(MODEL), "ngram", "float32", link_gbps=1000.0)


def ask(engine: TriForce, session: Any, tokens: int, question: str, new_tokens: int) -> Generation:
    prompt = build_prompt(engine.tokenizer, long_text("code", engine.tokenizer, tokens), question)
    return engine.generate(prompt, session=session, max_new_tokens=new_tokens, do_sample=False)


def told(found: Generation) -> dict[str, Any]:
    """What is compared."""
    stats = found.stats
    return {
        "prompt_tokens": stats.prompt_tokens,
        "reused_tokens": stats.reused_tokens,
        "ttft_s": stats.ttft_s,
        "link_bytes_before_decoding": stats.prefill_link_bytes,
        "full_kv_bytes": stats.full_kv_bytes,
        "token_ids": found.token_ids,
    }


def elsewhere(tokens: int, new_tokens: int, folder: Path | None) -> dict[str, Any]:
    """The second question, asked by a process of its own."""
    command = [sys.executable, "-m", "benchmarks.session_reuse", "--tokens", str(tokens), "--new", str(new_tokens)]
    command += ["--ask", str(folder or "-")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return json.loads(done.stdout.splitlines()[-1])


def measure(tokens: int, new_tokens: int) -> dict[str, Any]:
    """All of it.

    Raises:
        RuntimeError: answers differ.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "session"
        with load() as engine, engine.session() as session:
            found = {"first question": told(ask(engine, session, tokens, FIRST, new_tokens))}
            session.save(place)
            os.sync()  # a disk that is still writing would slow down what is timed next
            found["second question"] = told(ask(engine, session, tokens, SECOND, new_tokens))
        found["in another process"] = elsewhere(tokens, new_tokens, place)
        found["with nothing in hand"] = elsewhere(tokens, new_tokens, None)
    fresh = found["with nothing in hand"]
    for name in ("second question", "in another process"):
        if found[name]["token_ids"] != fresh["token_ids"]:
            raise RuntimeError(f"{name}: {found[name]['token_ids']} instead of {fresh['token_ids']}")
    for each in found.values():
        each["ttft_over_first"] = each["ttft_s"] / found["first question"]["ttft_s"]
        each["new_tokens"] = len(each.pop("token_ids"))
    return {"machine": describe_machine(), "loadavg": os.getloadavg(), "model": MODEL, "questions": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=6000, help="of the text that is asked about")
    parser.add_argument("--new", type=int, default=32, help="tokens of each answer")
    parser.add_argument(
        "--ask", help="used by itself: ask the second question alone, of a saved session or (-) of none"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.ask is not None:
        with load() as engine:
            session = engine.session() if args.ask == "-" else engine.load_session(args.ask)
            print(json.dumps(told(ask(engine, session, args.tokens, SECOND, args.new))))
        return
    report = measure(args.tokens, args.new)
    report["command"] = f"python -m benchmarks.session_reuse --tokens {args.tokens} --new {args.new}"
    for name, found in report["questions"].items():
        crossed = found["link_bytes_before_decoding"] / found["full_kv_bytes"]
        print(
            f"{name:22} {found['reused_tokens']:6,} of {found['prompt_tokens']:,} tokens reused, first token after "
            f"{found['ttft_s']:6.2f} s ({found['ttft_over_first']:.3f} of the first question's), "
            f"{crossed:.2f} times the cache over the link before"
        )
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
