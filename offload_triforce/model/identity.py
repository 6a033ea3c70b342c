"""Which model a text was read by, in words that survive the process: nothing here needs torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelIdentity:
    """What must be the same for keys and values to mean the same; ``fingerprint.identify`` computes it.

    Attributes:
        name: for people, such as "LlamaForCausalLM, 0.13e9 weights"; it is not compared.
        configuration: hash over all settings that a forward pass may depend on.
        weights: hash over a sample of every weight.
        tokenizer: hash over what turns text into ids; empty where there is none.
    """

    name: str
    configuration: str
    weights: str
    tokenizer: str = ""

    def difference(self, other: ModelIdentity) -> str | None:
        """In what the ``other`` is another model, as the end of "it has ..."; None if it is the same."""
        if self.configuration != other.configuration:
            return "another configuration"
        if self.weights != other.weights:
            return "the same configuration but other weights, or weights that are quantised in another way"
        if self.tokenizer and other.tokenizer and self.tokenizer != other.tokenizer:
            return "the same weights but another tokenizer"
        return None
