"""The real model on real text: 1,800 tokens of standard-library source."""

import pytest
import torch

from offload_triforce import TriForce
from offload_triforce.bench.texts import demo_prompt

NEW_TOKENS = 32
pytestmark = pytest.mark.xdist_group("smollm2")


@pytest.fixture(scope="module")
def reference(smollm2):
    """The prompt and transformers' own greedy answer to it."""
    model, tokenizer = smollm2
    prompt = demo_prompt(TriForce(model, tokenizer), 1800)
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True
    )
    return prompt, output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("draft", ["ngram", pytest.param("self", marks=pytest.mark.slow)])
def test_greedy_equals_transformers(smollm2, reference, draft):
    """Token for token, at a third of the context; and the counts that a pass over a known cache must give."""
    prompt, expected = reference
    with TriForce(
        *smollm2, draft=draft, budget=600, draft_cache=256, tile=512, draft_cost=0.05, link_gbps=1000
    ) as engine:
        result = engine.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    stats = result.stats
    assert result.token_ids == expected
    assert stats.tokens_per_pass > 6
    assert stats.draft.proposed > 0
    # 3 whole tiles of 512 tokens in each of 30 layers; K and V of 3 heads of 64 float32 values.
    tile = 512 * 2 * 3 * 64 * 4
    assert len(prompt) // 512 == 3
    assert stats.prefill_link_bytes == 30 * 3 * tile
    assert stats.link_bytes == stats.passes * 30 * 3 * tile
    assert stats.full_kv_bytes == 30 * (len(prompt) + len(expected) - 1) * 2 * 3 * 64 * 4
