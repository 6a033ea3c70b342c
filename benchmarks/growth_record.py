"""What level 1 offers along an answer of the target, recorded once: how trees grow is then replayed without a model.

With coupled acceptance the answer does not depend on what was drafted (see ``speculation.acceptance``). So the target
answers first, one token after the other; then level 1 reads the answer as it is, with a retrieval cache that was
refreshed at one place of it after the other. What it offers at a place, by how long ago the refresh was, is kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.retrieval_level import ChosenLevel, FullText
from benchmarks.retrieval_ways import BLOCK, LEAST_BUDGET, Asking, Way, same_memory
from offload_triforce.bench.speculation import SHARE
from offload_triforce.bench.tasks import Task, loops, prompts
from offload_triforce.cache.sizes import RetrievalShape
from offload_triforce.config import Settings
from offload_triforce.engine import TriForce
from offload_triforce.model.adapter import attached
from offload_triforce.runtime.reading import Reading
from offload_triforce.scheduler.device import on
from offload_triforce.speculation.noise import Noise

# Candidates kept for a place; tokens of the answer between two refreshes; tokens read behind each.
CANDIDATES, STRIDE, REACH = 8, 4, 64

Say = Callable[[str], None]
Race = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Offers:
    """Candidates at the places behind a refresh, best first: the scores that they race with, and their tokens."""

    scores: list[list[float]]
    tokens: list[list[int]]


@dataclass(frozen=True)
class Record:
    """One answer.

    Attributes:
        task, temperature, seed: what was asked. prompt, answer: token ids. looped: see ``tasks.loops``.
        offers: by the number of answer tokens that were there at the refresh. Those of place n are the candidates for
            answer token ``refresh + n``.
    """

    task: str
    temperature: float
    seed: int
    prompt: list[int]
    answer: list[int]
    looped: bool
    offers: dict[int, Offers]

    @property
    def name(self) -> str:
        """Of its file."""
        return file_name(self.task, self.temperature, self.seed)

    def save(self, folder: Path) -> None:
        """Write it to a folder."""
        (folder / self.name).write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read one."""
        kept = json.loads(path.read_text())
        offers = {int(refresh): Offers(**each) for refresh, each in kept["offers"].items()}
        return cls(**{**kept, "offers": offers})


def file_name(task: str, temperature: float, seed: int) -> str:
    """Of a record."""
    return f"{task}_{temperature:g}_{seed}.json"


def load_records(folder: Path) -> list[Record]:
    """All of a folder that do not fall into loops."""
    records = [Record.load(path) for path in sorted(folder.glob("*.json"))]
    return [record for record in records if not record.looped]


def record_answer(
    engine: TriForce, task: Task, temperature: float, seed: int, tokens: int, new_tokens: int, share: int = SHARE
) -> Record:
    """Let the model answer, and record what level 1 offers on the way.

    Args:
        engine: a loaded model, all of whose layers attend to everything. task, temperature, seed: what is asked.
        tokens: of the prompt. new_tokens: of the answer. share: the budget is this part of the prompt, in 16 bits, but
            at least LEAST_BUDGET; it is spent on chunks of 4 bits.

    Raises:
        InputError: the model has layers with nothing to choose, or there is no text of that length.
    """
    ids, layout = prompts(engine.tokenizer, [task], tokens)[task], engine.layout
    reading = Reading.of(engine.model, layout, ids[:-1])
    ends = engine.model.generation_config.eos_token_id
    noise = Noise(seed, 0, layout.vocabulary, layout.device) if temperature > 0 else None

    def race(logits: Tensor, place: int) -> Tensor:
        scores = logits[: layout.vocabulary].float()
        if ends is not None:  # what follows an end is no text
            scores[torch.as_tensor(ends, device=scores.device)] = float("-inf")
        return scores if noise is None else (scores / temperature).log_softmax(0) + noise.at(place)

    with on(layout.device), attached(engine.model), torch.no_grad():
        text = FullText(engine.model, layout, reading, new_tokens)
        first = text.asking
        answer, queries = _answer(text, ids[-1], new_tokens, race)
        reference = RetrievalShape(max(LEAST_BUDGET, tokens // share), Settings.chunk, Settings.sink, Settings.recent)
        shape = same_memory(reference, Settings.chunk, Settings.bits, layout.attention[0].head_dim)
        level, offers = ChosenLevel(Way("default", "default", shape), text), {}
        for refresh in range(0, new_tokens, STRIDE):
            level.choose(_asking(queries, refresh, text.prompt) if refresh else first)
            offers[refresh] = _offers(level, [ids[-1], *answer], refresh, text.prompt, race)
    return Record(task.name, temperature, seed, ids, answer, loops(answer), offers)


def _answer(text: FullText, token: int, count: int, race: Race) -> tuple[list[int], list[Sequence[Tensor]]]:
    """``count`` tokens after ``token``, and the queries, of each layer, that each token but the last asked with."""
    answer, queries = [], []
    for place in range(count):
        logits = text.step([token])[0]
        queries.append(text.asking.queries)
        token = int(race(logits, place).argmax())
        answer.append(token)
    return answer, queries


def _asking(queries: Sequence[Sequence[Tensor]], refresh: int, prompt: int) -> Asking:
    """What the newest tokens before a refresh leave for a choice."""
    newest = queries[max(0, refresh - BLOCK) : refresh]
    layers = [torch.cat(layer, dim=1) for layer in zip(*newest, strict=True)]
    return Asking(layers, prompt + refresh, prompt + refresh - len(newest))


def _offers(level: ChosenLevel, line: Sequence[int], refresh: int, prompt: int, race: Race) -> Offers:
    """What a level offers behind a refresh. ``line``: the prompt's last token, and the answer."""
    read = line[refresh : min(refresh + REACH, len(line) - 1)]
    logits = level.step(read, prompt + refresh)
    scores = torch.stack([race(row, refresh + place) for place, row in enumerate(logits)])
    best, tokens = scores.topk(CANDIDATES, dim=1)
    return Offers(best.tolist(), tokens.tolist())
