"""What one decoding run counts and times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

INTERRUPTED = "interrupted"
RANKS = 4  # choices that are told apart


@dataclass
class Acceptance:
    """How many of one level's draft tokens were accepted."""

    proposed: int = 0
    judged: int = 0
    accepted: int = 0

    def add(self, proposed: int, accepted: int) -> None:
        """One round. Draft tokens after the first rejected one are not judged."""
        self.proposed += proposed
        self.accepted += accepted
        self.judged += min(proposed, accepted + 1)

    @property
    def rate(self) -> float | None:
        """Share of the judged draft tokens that were accepted; None if there were none."""
        return self.accepted / self.judged if self.judged else None


@dataclass
class DecodeStats:
    """Counts and times of one run. Times in seconds, sizes in bytes.

    ``reused_tokens``: of the prompt, held from before and not read again. ``resumed_tokens``: beside them, a prefill
    that had been stopped went on, as far as if it had read so many whole.
    ``steps`` of the retrieval level took ``draft_s``; ``steps_ahead`` of them, made while a pass was under way,
    ``ahead_s``, and all read ``step_tokens``. ``draft_tokens``: those that the target read, over all passes.
    ``link_bytes`` are wire bytes, ``raw_link_bytes`` what they were before coding, both while decoding.
    ``resident_link_bytes``: brought up for resident tiles, once, between the prefill and the first pass.
    ``ranks``: places at which the target took level 1's first choice, its second, third, fourth, or none of these.
    ``by_drafter``: the draft tokens of level 0, by who made them: ngram, model, mtp.
    ``target_only``: logits processors that drafts were made without.
    ``ending``: why the answer ended, if it was not interrupted; None until it has.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    resumed_tokens: int = 0
    new_tokens: int = 0
    passes: int = 0
    draft: Acceptance = field(default_factory=Acceptance)
    retrieval: Acceptance = field(default_factory=Acceptance)
    ranks: list[int] = field(default_factory=lambda: [0] * (RANKS + 1))
    by_drafter: dict[str, Acceptance] = field(default_factory=dict)
    link_bytes: int = 0
    raw_link_bytes: int = 0
    prefill_link_bytes: int = 0
    resident_link_bytes: int = 0
    full_kv_bytes: int = 0
    prefill_s: float = 0.0
    ttft_s: float = 0.0
    decode_s: float = 0.0
    draft_s: float = 0.0
    ahead_s: float = 0.0
    steps: int = 0
    steps_ahead: int = 0
    step_tokens: int = 0
    draft_tokens: int = 0
    interrupted: bool = False
    target_only: tuple[str, ...] = ()
    ending: str | None = None

    @property
    def finish_reason(self) -> str | None:
        """Why the answer ended, see ``Generation``; None until it has."""
        return INTERRUPTED if self.interrupted else self.ending

    def add_step(self, tokens: int, seconds: float, hidden: bool) -> None:
        """A step of the retrieval level read so many tokens; ``hidden``: during a pass."""
        self.steps += 1
        self.step_tokens += tokens
        self.draft_s += seconds
        self.steps_ahead += hidden
        self.ahead_s += seconds if hidden else 0.0

    def add_draft(self, drafter: str, proposed: int, accepted: int) -> None:
        """A drafter's draft tokens have been judged by the retrieval level."""
        self.draft.add(proposed, accepted)
        self.by_drafter.setdefault(drafter, Acceptance()).add(proposed, accepted)

    def add_choice(self, choices: Sequence[int], taken: int) -> None:
        """Where level 1 had these ``choices``, best first, the target took that token."""
        best = choices[:RANKS]
        self.ranks[best.index(taken) if taken in best else RANKS] += 1

    def add_pass(self, drafted: int, accepted: int, rejected: bool, new_tokens: int) -> None:
        """A pass read so many draft tokens, accepted some along a path, and brought new tokens.

        ``rejected``: whether there were draft tokens where the path ended, all of them wrong.
        """
        self.passes += 1
        self.new_tokens += new_tokens
        self.draft_tokens += drafted
        self.retrieval.proposed += drafted
        self.retrieval.accepted += accepted
        self.retrieval.judged += accepted + rejected

    @property
    def tokens_per_pass(self) -> float:
        """New tokens for each time that the full cache was streamed."""
        return self.new_tokens / self.passes if self.passes else 0.0

    @property
    def link_bytes_per_token(self) -> float:
        """Bytes over the link while decoding, both directions, per new token."""
        return self.link_bytes / self.new_tokens if self.new_tokens else 0.0

    @property
    def wire_ratio(self) -> float:
        """Raw bytes over wire bytes, of what crossed the link while decoding; 1 if nothing did."""
        return self.raw_link_bytes / self.link_bytes if self.link_bytes else 1.0

    @property
    def ms_per_token(self) -> float:
        """Decoding time (prefill apart) per new token."""
        return 1e3 * self.decode_s / self.new_tokens if self.new_tokens else 0.0

    @property
    def hidden_share(self) -> float | None:
        """Share of the drafting time during which a pass was under way; None if there was no drafting."""
        return self.ahead_s / self.draft_s if self.draft_s else None

    def as_dict(self) -> dict[str, Any]:
        """Everything, under the names of the JSON report."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "reused_tokens": self.reused_tokens,
            "resumed_tokens": self.resumed_tokens,
            "new_tokens": self.new_tokens,
            "passes": self.passes,
            "tokens_per_pass": self.tokens_per_pass,
            "acceptance": {"draft": self.draft.rate, "retrieval": self.retrieval.rate},
            "proposed": {"draft": self.draft.proposed, "retrieval": self.retrieval.proposed},
            "ranks": list(self.ranks),
            "by_drafter": {
                name: {"proposed": one.proposed, "judged": one.judged, "accepted": one.accepted}
                for name, one in self.by_drafter.items()
            },
            "link_bytes": self.link_bytes,
            "raw_link_bytes": self.raw_link_bytes,
            "wire_ratio": self.wire_ratio,
            "link_bytes_per_token": self.link_bytes_per_token,
            "prefill_link_bytes": self.prefill_link_bytes,
            "resident_link_bytes": self.resident_link_bytes,
            "full_kv_bytes": self.full_kv_bytes,
            "prefill_s": self.prefill_s,
            "ttft_s": self.ttft_s,
            "decode_s": self.decode_s,
            "draft_s": self.draft_s,
            "ahead_s": self.ahead_s,
            "hidden_share": self.hidden_share,
            "draft_tokens": self.draft_tokens,
            "steps": self.steps,
            "steps_ahead": self.steps_ahead,
            "step_tokens": self.step_tokens,
            "ms_per_token": self.ms_per_token,
            "interrupted": self.interrupted,
            "target_only": list(self.target_only),
            "finish_reason": self.finish_reason,
        }
