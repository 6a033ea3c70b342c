"""Every causal language model of the installed transformers: does it run exactly, or why is it refused?

    python -m benchmarks.families [TYPE ...] [--flips] [--json FILE] [--markdown docs/models.md]

Each model type gets a tiny random model (benchmarks/tiny_families.py) in several variants (family_cases.py). One counts
as equal if what comes out with n-gram draft tokens and trees is, token for token, what transformers' own ``generate``
says: greedy, in fp32, some hundred tokens of prompt, past its windows. Exit code 1 if anything is wrong or crashes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.family_audit import VERDICTS, Finding
from benchmarks.family_cases import Case, cases_of
from benchmarks.family_page import render
from benchmarks.tiny_families import model_types

BATCH = 12  # cases per process: a model that ends its process takes few others with it
BAD = ("dull", "wrong", "crash")


def run_batch(cases: Sequence[Case], seconds: int) -> list[Finding]:
    """Try cases in a process of their own; where one ends it, the rest get another."""
    found: list[Finding] = []
    while len(found) < len(cases):
        rest = cases[len(found) :]
        given = json.dumps({"cases": [case.as_dict() for case in rest], "seconds": seconds})
        worker = [sys.executable, "-m", "benchmarks.family_audit"]
        quiet = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        limit = 60 + 2 * seconds * len(rest)
        try:
            done = subprocess.run(worker, input=given, capture_output=True, text=True, env=quiet, timeout=limit)
            output, ended = done.stdout, f"its process ended with code {done.returncode}"
        except subprocess.TimeoutExpired as error:
            output, ended = (error.stdout or b"").decode(), f"its process gave no answer within {limit} s"
        lines = [line for line in output.splitlines() if line.endswith("}")]
        found += [Finding(**{**values, "kinds": tuple(values["kinds"])}) for values in map(json.loads, lines)]
        if len(lines) < len(rest):
            lost = rest[len(lines)]
            found.append(Finding(lost.model_type, lost.variant, lost.model_type, "crash", ended))
    return found


def run_all(cases: Sequence[Case], jobs: int, seconds: int) -> Iterator[Finding]:
    """Try cases in several processes at a time; findings come in the order of the cases."""
    batches = [cases[start : start + BATCH] for start in range(0, len(cases), BATCH)]
    with ThreadPoolExecutor(jobs) as pool:
        for found in pool.map(run_batch, batches, [seconds] * len(batches)):
            yield from found


def show(console: Console, findings: Sequence[Finding]) -> None:
    """A table of all, and how many there are of each."""
    table = Table("model type", "variant", "verdict", "passes", "accepted", "why")
    styles = {"equal": "green", "refused": "dim", "unbuilt": "dim", "dull": "yellow", "wrong": "red", "crash": "red"}
    for found in findings:
        ran = found.judged > 0
        row = (found.model_type, found.variant, f"[{styles[found.verdict]}]{found.verdict}[/]")
        table.add_row(
            *row, str(found.passes) if ran else "", f"{found.accepted}/{found.judged}" if ran else "", found.why
        )
    console.print(table)
    families = Counter(found.verdict for found in findings if not found.variant)
    others = Counter(found.verdict for found in findings if found.variant)
    for what, counts in (("model types", families), ("variants", others)):
        told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
        console.print(f"{sum(counts.values())} {what}: {told}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", metavar="TYPE", help="model types; all by default")
    parser.add_argument("--flips", action="store_true", help="also turn every boolean of each configuration")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--seconds", type=int, default=240, help="most seconds per case")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all findings")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the page of models")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.types) - set(model_types()))
    if unknown:
        parser.error(f"not a causal language model of transformers {transformers.__version__}: {', '.join(unknown)}")
    if arguments.markdown and (arguments.types or arguments.flips):
        parser.error("the page of models is made of all model types, without --flips")
    return arguments


def main() -> None:
    arguments = parse()
    cases = [case for kind in arguments.types or model_types() for case in cases_of(kind, arguments.flips)]
    findings: list[Finding] = []
    console = Console(stderr=True)
    with console.status("trying") as status:
        for found in run_all(cases, arguments.jobs, arguments.seconds):
            findings.append(found)
            status.update(f"{len(findings)} of {len(cases)}: {found.model_type} {found.verdict}")
            if found.verdict in BAD:
                console.print(f"{found.model_type} {found.variant}: {found.verdict}, {found.why}", highlight=False)
    show(Console(), findings)
    versions = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if arguments.json:
        report = {"versions": versions, "findings": [found.as_dict() for found in findings]}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(render(findings, versions))
    if any(found.verdict in BAD for found in findings):
        sys.exit(1)


if __name__ == "__main__":
    main()
