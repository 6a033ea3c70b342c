"""The planner's answer: what lies where and how long it takes, or what is missing and what would fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from offload_triforce.config import Settings
from offload_triforce.planner.choose import assume
from offload_triforce.planner.fit import Footprint, footprint, missing
from offload_triforce.planner.predict import Prediction, predict
from offload_triforce.planner.question import Question
from offload_triforce.planner.suggest import suggest


@dataclass(frozen=True)
class Answer:
    """``prediction`` is None where it does not fit."""

    question: Question
    settings: Settings
    used: Footprint
    missing: list[dict[str, int | str]]
    suggestions: list[dict[str, str]]
    prediction: Prediction | None
    assumptions: list[str]
    notes: list[str]

    @property
    def options(self) -> str:
        """The settings as options of ``generate``."""
        names = ("budget", "gamma", "gamma1", "tile", "ring", "resident")
        given = {"context": self.question.context} | {name: getattr(self.settings, name) for name in names}
        given["quantize"] = self.question.model.quantize
        return " ".join(f"--{name} {value}" for name, value in given.items() if value is not None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON. Sizes in bytes; times in the unit of their name; null where it does not fit."""
        asked, told = self.question, self.prediction
        return {
            "fits": not self.missing,
            "model": asked.model.name,
            "parameters": asked.model.weights.parameters,
            "quantize": asked.model.quantize,
            "context": asked.context,
            "machine": asked.machine.name,
            "vram_bytes": self.used.vram_bytes,
            "vram_limit": asked.machine.memory,
            "host_bytes": self.used.host_bytes,
            "host_limit": asked.machine.host,
            "ms_per_token": told and told.round.ms_per_token,
            "ms_per_token_plain": told and told.plain_ms,
            "prefill_s": told and told.prefill_s,
            "tokens_per_pass": told and told.round.tokens,
            "pass_s": told and told.passing.seconds,
            "pass_link_s": told and told.passing.link,
            "step_ms": told and 1e3 * told.round.step_s,
            "steps_per_pass": told and told.round.steps,
            "missing": self.missing,
            "suggestions": self.suggestions,
            "settings": {name: value for name, value in vars(self.settings).items() if name != "link_gbps"},
            "options": self.options,
            "device": self.used.device,
            "host": self.used.host,
            "assumptions": self.assumptions,
            "notes": self.notes,
        }


def answer(question: Question) -> Answer:
    """Whether it fits, what lies where, and how fast it will be.

    Raises:
        InputError: settings that contradict each other.
    """
    asked, machine = question, question.machine
    settings = asked.choose()
    used = footprint(asked.model, settings, asked.context, asked.draft)
    gaps = missing(used, machine.memory, machine.host)
    rates = assume(settings, asked.context, asked.draft_kind, asked.retrieval, asked.drafted)
    told = None if gaps else predict(asked.model, settings, asked.context, machine, rates, asked.draft)
    said = list(machine.said)
    if told is not None and used.plan is not None:
        said += [
            f"the target accepts {rates.retrieval:.1%} of the retrieval level's guesses"
            + (
                " (as given)"
                if asked.retrieval is not None
                else ", from Qwen2.5-Coder-1.5B on 24K tokens of source code; yours will differ"
            ),
            f"the retrieval level accepts {rates.draft:.0%} of the draft's guesses ({asked.draft_kind})",
            "one path of guesses at a time: branches, and guessing that passes hide, are left out; both help",
            "times of kernels from bandwidth and TFLOPS alone; sampling and tokenising are left out",
        ]
    return Answer(question, settings, used, gaps, suggest(asked) if gaps else [], told, said, _notes(asked))


def _notes(asked: Question) -> list[str]:
    layout, notes = asked.model.layout, []
    if layout.max_positions is not None and asked.context > layout.max_positions:
        notes.append(
            f"{asked.context:,} tokens are more than the model's {layout.max_positions:,} positions: `generate` "
            "refuses them until its config.json has a longer rotary scaling, such as YaRN"
        )
    if not layout.full:
        notes.append("all layers have a sliding window, which stays on the card: nothing is streamed")
    if asked.model.quantize and asked.model.weights.experts:
        notes.append("bitsandbytes leaves the experts in 16 bits")
    return notes
