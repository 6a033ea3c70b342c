"""One case tried: does the output equal transformers' own, is the model refused and why, or is something wrong?

As a program it is the worker of ``benchmarks.families``: cases come as JSON on standard input, findings go out as JSON,
one a line.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from benchmarks.family_cases import Case
from benchmarks.tiny_families import VOCABULARY, tiny_config, tiny_model
from offload_triforce import Settings, TriForce
from offload_triforce.errors import InputError, TriForceError
from offload_triforce.model.multimodal import loaded_config, loading_options
from offload_triforce.model.refusals import class_name
from offload_triforce.model.shape import shape_of
from offload_triforce.model.text_part import maker, other_parts

PROMPT, NEW = 260, 72
# Tiles, refreshes, trees and windows all come up; what a draft costs is fixed, so that nothing depends on the machine.
# Without the program's own check of what nobody tried: this is where it is tried.
SETTINGS = Settings(
    budget=64, chunk=4, sink=4, recent=16, tile=32, gamma=6, gamma1=3, prefill_chunk=97, draft_cost=0.05, check=False
)
SPREADS = (0.2, 0.3, 0.1, 0.4, 0.15)  # of weights: tried in this order until a text is lively
LIVELY = 12  # different tokens in an answer

VERDICTS = ("equal", "refused", "unbuilt", "dull", "wrong", "crash")


@dataclass(frozen=True)
class Finding:
    """What came of a case.

    Attributes:
        verdict: "equal" to transformers; "refused" by name; "unbuilt": transformers itself makes no model of it, or
            does not run it; "dull": equal, but the text says too little to mean much; "wrong"; "crash".
        why: the sentence of a refusal, or what is the matter. model: its class.
        distinct: different tokens in the answer. passes: over the full cache. accepted, judged: of the retrieval
            level's draft tokens. drafted: n-gram's draft tokens that were judged.
    """

    model_type: str
    variant: str
    model: str
    verdict: str
    why: str = ""
    kinds: tuple[str, ...] = ()  # of its layers
    distinct: int = 0
    passes: int = 0
    accepted: int = 0
    judged: int = 0
    drafted: int = 0
    part: bool = False  # the text decoder of a model that sees or hears as well

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def try_case(case: Case) -> Finding:
    """Plan the model, load it, and decode greedily with n-gram draft tokens and trees. Raises nothing."""
    name = case.model_type
    try:
        try:
            config = tiny_config(case.model_type, **case.changes)
            name = class_name(config)
        except Exception as error:
            return _finding(case, name, "unbuilt", _reason(error))
        planned: Any = None
        try:
            planned = shape_of(config, torch.float32).layout
        except InputError as error:
            return _finding(case, name, "unbuilt", str(error))
        except TriForceError as error:
            planned = str(error)
        try:
            model = tiny_model(config, SPREADS[0])
        except Exception as error:
            if isinstance(planned, str):
                return _finding(case, name, "refused", planned)
            return _finding(case, name, "crash", f"planned, but not made: {_reason(error)}")
        return _decode(case, name, config, model, planned)
    except Exception as error:  # this is what is looked for
        traceback.print_exc()
        return _finding(case, name, "crash", f"{type(error).__name__}: {_reason(error)}")


def _decode(case: Case, name: str, config: Any, model: PreTrainedModel, planned: Any) -> Finding:
    try:
        TriForce(model, settings=SETTINGS).close()
    except TriForceError as error:
        # The configuration that a model was made of may say more than the one it keeps.
        same = isinstance(planned, str)
        return _finding(case, name, "refused" if same else "crash", planned if same else f"planned, but: {error}")
    if isinstance(planned, str):
        return _finding(case, name, "crash", f"loaded, but not planned: {planned}")
    prompt = prompt_ids()
    try:
        model, expected = liveliest(config, prompt)
    except Exception as error:
        return _finding(case, name, "unbuilt", f"transformers' own generate: {_reason(error)}")
    try:
        loaded = as_loaded(model)
    except InputError as error:
        return _finding(case, name, "unbuilt", str(error))
    with TriForce(loaded, draft="ngram", settings=SETTINGS) as engine:
        if engine.layout.layers != planned.layers:
            return _finding(case, name, "crash", "planned with another layout than it has")
        result = engine.generate(prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    counts = {"distinct": len(set(expected)), "passes": result.stats.passes, "drafted": result.stats.draft.judged}
    counts |= {"accepted": result.stats.retrieval.accepted, "judged": result.stats.retrieval.judged}
    verdict, why = "equal", ""
    if result.token_ids != expected:
        at = next(i for i, pair in enumerate(zip(result.token_ids, expected, strict=True)) if len(set(pair)) > 1)
        verdict, why = "wrong", f"differs from token {at} of {NEW} on"
    elif counts["distinct"] < LIVELY // 2 or not counts["accepted"] or not counts["drafted"]:
        verdict, why = "dull", "the text says too little, or no draft token was judged"
    counts["part"] = loaded is not model
    kinds = tuple(kind for kind in ("full", "sliding", "recurrent") if getattr(engine.layout, kind))
    return Finding(case.model_type, case.variant, name, verdict, why, kinds, **counts)


def liveliest(config: Any, prompt: Tensor) -> tuple[PreTrainedModel, list[int]]:
    """A random model whose answer has many different tokens, and transformers' own answer of it."""
    best: tuple[PreTrainedModel, list[int]] | None = None
    for spread in SPREADS:
        model = tiny_model(config, spread)
        answer = greedy(model, prompt)
        if best is None or len(set(answer)) > len(set(best[1])):
            best = model, answer
        if len(set(answer)) >= LIVELY and len(set(answer[-NEW // 2 :])) >= LIVELY // 2:
            return model, answer
    return best


def as_loaded(model: PreTrainedModel) -> PreTrainedModel:
    """What is loaded of a model's files: of one that sees or hears as well, its text decoder."""
    if not other_parts(model.config):
        return model
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = AutoConfig.from_pretrained(folder)
        options = {"config": config, "dtype": torch.float32, "output_loading_info": True} | loading_options(config)
        loaded, found = maker(loaded_config(config)).from_pretrained(folder, **options)
    if missing := sorted(found["missing_keys"]):
        raise InputError(f"{len(missing)} weights are not found in its files, such as {missing[0]}")
    return loaded.eval()


def greedy(model: PreTrainedModel, prompt: Tensor) -> list[int]:
    """What transformers itself makes of it."""
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    return output[0, prompt.shape[1] :].tolist()


def prompt_ids() -> Tensor:
    """Random ids [1, n] that end as they begin: there is something for n-grams to find."""
    generator = torch.Generator().manual_seed(5)
    part = torch.randint(3, VOCABULARY, (80,), generator=generator)
    middle = torch.randint(3, VOCABULARY, (PROMPT - 160,), generator=generator)
    return torch.cat([part, middle, part])[None]


def _finding(case: Case, name: str, verdict: str, why: str) -> Finding:
    return Finding(case.model_type, case.variant, name, verdict, why)


def _reason(error: Exception) -> str:
    """The last line: validators of configurations say there what is wrong."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


@contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main() -> None:
    """Try the cases of standard input, each within so many seconds."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # some models print
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    given = json.load(sys.stdin)
    for values in given["cases"]:
        case = Case(**values)
        try:
            with _limit(given["seconds"]):
                found = try_case(case)
        except TimeoutError as error:
            found = _finding(case, case.model_type, "crash", str(error))
        answers.write(json.dumps(found.as_dict()) + "\n")


if __name__ == "__main__":
    main()
