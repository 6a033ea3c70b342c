"""The demo: a real model, a real long text, plain and hierarchical decoding over an emulated slow link."""

from __future__ import annotations

from rich.console import Console

from offload_triforce.bench.texts import QUESTION, demo_prompt
from offload_triforce.cli.report import bars, comparison
from offload_triforce.config import Settings
from offload_triforce.engine import TriForce
from offload_triforce.errors import InputError, TriForceError
from offload_triforce.generation.answer import Generation
from offload_triforce.model.fetch import fetch_model


def run_demo(
    console: Console,
    settings: Settings,
    draft: str,
    prompt_tokens: int,
    new_tokens: int,
    temperature: float,
    seed: int,
    device: str = "auto",
) -> dict[str, Generation]:
    """Decode the same prompt plainly and through the hierarchy, and print both in one table.

    Raises:
        TriForceError: tokens differ, which must not happen: at a temperature too, the two share their noise.
    """
    if draft not in ("auto", "ngram", "self", "ngram+self", "none"):  # SmolLM2 has no MTP head
        raise InputError(f"the demo's drafts are auto, ngram, self, ngram+self and none, not {draft!r}")
    with console.status("bringing SmolLM2-135M-Instruct (98 MB, once)"):
        path = fetch_model("smollm2")
    with console.status("loading it"):
        plain = TriForce.load(path, draft="none", dtype="float32", device=device, settings=settings, gamma=0)
    prompt = demo_prompt(plain, prompt_tokens)
    link = f"an emulated link of {settings.link_gbps:g} GB/s" if settings.link_gbps else "the link"
    console.print(f"{len(prompt):,} tokens of Python's standard library; KV cache in host memory behind {link}.")
    console.print(f"{QUESTION}\n", style="bold")
    runs = {}
    for name, engine in (
        ("plain", plain),
        ("hierarchy", TriForce(plain.model, plain.tokenizer, draft, settings=settings)),
    ):
        console.rule(f"{name} decoding", align="left")
        with engine, bars(console) as (progress, pinning):
            told = {"progress": progress, "pinning": pinning}
            stream = engine.stream(prompt, max_new_tokens=new_tokens, temperature=temperature, seed=seed, **told)
            for piece in stream:
                console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
            runs[name] = stream.result
        console.print("\n")
    console.print(comparison({name: run.stats for name, run in runs.items()}))
    _judge(console, runs)
    return runs


def _judge(console: Console, runs: dict[str, Generation]) -> None:
    plain, hierarchy = runs["plain"], runs["hierarchy"]
    faster = plain.stats.ms_per_token / hierarchy.stats.ms_per_token if hierarchy.stats.ms_per_token else 0.0
    if plain.token_ids == hierarchy.token_ids:
        console.print(f"Identical tokens, {faster:.1f}x the speed.", style="bold green", highlight=False)
    else:
        pairs = enumerate(zip(plain.token_ids, hierarchy.token_ids, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(plain.token_ids), len(hierarchy.token_ids)))
        raise TriForceError(f"the two decodings differ from new token {at} on, which must not happen: please report it")
