"""What the tests of this folder share: a walk through every outcome of chance, and tiny models."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM


class Walk:
    """Choices that follow a plan of outcomes, and then take the first possible outcome each time."""

    def __init__(self, plan):
        self.plan, self.trace, self.probability = plan, [], 1.0

    def accept(self, probability):
        return self._choose([1.0 - probability, probability]) == 1

    def draw(self, distribution):
        return self._choose(distribution.tolist())

    def _choose(self, odds):
        assert all(chance >= 0 for chance in odds)
        assert abs(sum(odds) - 1) < 1e-6
        at = len(self.trace)
        taken = self.plan[at] if at < len(self.plan) else next(i for i, chance in enumerate(odds) if chance > 0)
        self.trace.append((taken, odds))
        self.probability *= odds[taken]
        return taken

    def next_plan(self):
        """The next walk in depth-first order, or None."""
        for depth in reversed(range(len(self.trace))):
            taken, odds = self.trace[depth]
            for other in range(taken + 1, len(odds)):
                if odds[other] > 0:
                    return [outcome for outcome, _ in self.trace[:depth]] + [other]
        return None


def walks(program):
    """Run ``program(choices)`` once per possible sequence of outcomes: yields (probability, result)."""
    plan = []
    while plan is not None:
        walk = Walk(plan)
        result = program(walk)
        yield walk.probability, result
        plan = walk.next_plan()


def distribution_of(program):
    """What ``program(choices)`` returns, with the exact probability of each result."""
    total = {}
    for probability, result in walks(program):
        total[result] = total.get(result, 0.0) + probability
    return total


def tiny_llama(seed=0, vocabulary=6, layers=1, hidden=16, heads=2, kv_heads=1, spread=0.5, positions=4096):
    """A random Llama whose distributions are neither flat nor peaked."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        initializer_range=spread,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()
