"""What the target says of each token, for those who want to know: as logprobs are told."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from offload_triforce.speculation.acceptance import AcceptanceRule
from offload_triforce.speculation.place import Place
from offload_triforce.speculation.tree import Candidates

# Told the target's logits [1, V] at a place of the text, and the token that is taken there.
Watch = Callable[[Tensor, int], None]


class Watched:
    """An acceptance rule whose verdicts somebody is told of: one for each token of the text, in order."""

    def __init__(self, rule: AcceptanceRule, watch: Watch) -> None:
        self.prior, self.draft, self.candidates, self.survey = rule.prior, rule.draft, rule.candidates, rule.survey
        self._rule, self._watch = rule, watch

    def verdict(
        self,
        logits: Tensor,
        place: Place,
        candidates: Candidates | None,
        offered: int,
        told: Sequence[float] | None = None,
    ) -> int:
        """See ``AcceptanceRule``."""
        token = self._rule.verdict(logits, place, candidates, offered, told)
        self._watch(logits, token)
        return token
