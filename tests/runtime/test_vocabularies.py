"""A target and a draft model whose (padded) vocabularies differ, and models that read other ids than they say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from offload_triforce import InputError, TriForce, stateless
from tests.byte_tokenizer import byte_tokenizer
from tests.stateful import Sequence
from tests.tiny import greedy, tiny_model

SMALL = {"budget": 48, "gamma": 5, "gamma1": 3, "chunk": 4, "sink": 4, "recent": 16, "tile": 16, "draft_cache": 32}
SMALL |= {"draft_cost": 0.05}
WIDE, NARROW, NEW = 320, 264, 16
FAR = 300  # an id that only the wide model knows


def sized(vocabulary, **changes):
    """Models of one seed do not agree, since their sizes differ: their drafts are bad ones, but drafts."""
    return tiny_model("llama", seed=1, calm=True, vocab_size=vocabulary, **changes)


def prompt_with(places, tokens=90):
    ids = torch.randint(3, 250, (1, tokens), generator=torch.Generator().manual_seed(2))
    ids[0, places] = FAR
    return ids


@pytest.fixture(scope="module")
def wide():
    return sized(WIDE)


@pytest.fixture(scope="module")
def narrow():
    return sized(NARROW)


PLACES = {"none": [], "in the sink": [1], "left out": [30], "in the window": [75, 80], "everywhere": [*range(0, 90, 3)]}
PLACES |= {"at the end": [89]}


@pytest.mark.parametrize(
    ("rule", "places"),
    [
        *(("coupled", places) for places in PLACES),
        *(pytest.param("resampled", p, marks=() if p == "at the end" else pytest.mark.slow) for p in PLACES),
    ],
)
def test_ids_that_the_draft_does_not_know(wide, narrow, places, rule):
    """They cost drafts, not the answer; what the draft has got behind it does not keep it from drafting."""
    prompt = prompt_with(PLACES[places])
    expected = greedy(wide, prompt, NEW)
    for draft in (narrow, ("ngram", narrow)):
        with TriForce(wide, draft=draft, rule=rule, same_tokens=True, **SMALL) as engine:
            result = engine.generate(prompt, max_new_tokens=NEW, do_sample=False)
            assert result.token_ids == expected
            assert result.stats.draft.proposed > 5
            assert len(engine.generate(prompt, max_new_tokens=NEW, temperature=1.5, seed=1).token_ids) == NEW


def test_a_target_that_says_what_the_draft_does_not_know(wide, narrow):
    """Nothing is drafted right behind such an id; then it goes on."""
    prompt, said = prompt_with([]), [20, FAR, FAR + 1, 21, 22, FAR, 23, 24, 25, 26]
    options = {"prefix_allowed_tokens_fn": stateless(Sequence(90, said)), "max_new_tokens": len(said)}
    for rule in ("coupled", "resampled"):
        with TriForce(wide, draft=narrow, rule=rule, same_tokens=True, **SMALL) as engine:
            result = engine.generate(prompt, temperature=1.0, seed=0, **options)
        assert result.token_ids == said
        assert result.stats.draft.accepted > 0


def test_a_draft_with_the_larger_vocabulary(wide, narrow):
    """It never drafts what the target cannot say."""
    prompt = prompt_with([])
    for rule in ("coupled", "resampled"):
        with TriForce(narrow, draft=wide, rule=rule, same_tokens=True, **SMALL) as engine:
            assert engine.generate(prompt, max_new_tokens=NEW, do_sample=False).token_ids == greedy(narrow, prompt, NEW)
            assert len(engine.generate(prompt, max_new_tokens=NEW, temperature=2.0, seed=1).token_ids) == NEW


def test_sizes_that_differ_have_to_be_meant(wide, narrow):
    with pytest.raises(InputError, match=r"264 tokens is not the target's of 320; .*same_tokens=True if only their"):
        TriForce(wide, draft=narrow)
    with pytest.raises(InputError, match="same_tokens must be True or False, not 'yes'"):
        TriForce(wide, draft=narrow, same_tokens="yes")


def test_tokenizers_that_agree_are_enough(wide, narrow):
    """Padding is no difference."""
    prompt = prompt_with([1, 80])
    with TriForce(wide, byte_tokenizer(), narrow, byte_tokenizer(), **SMALL) as engine:
        result = engine.generate(prompt, max_new_tokens=NEW, do_sample=False)
    assert result.token_ids == greedy(wide, prompt, NEW)


def test_tokenizers_that_differ_a_little_may_be_meant(wide, narrow):
    other = byte_tokenizer()
    other.add_tokens(["<extra>"])
    with pytest.raises(InputError, match=r"1 of 259 tokens differ.*same_tokens=True if these are few"):
        TriForce(wide, byte_tokenizer(), narrow, other)
    TriForce(wide, byte_tokenizer(), narrow, other, same_tokens=True).close()


def with_logits(model, count):
    """A model that says more or fewer tokens than it reads."""
    torch.manual_seed(5)
    head = nn.Linear(model.config.hidden_size, count, bias=False)
    known = min(count, model.lm_head.out_features)
    with torch.no_grad():
        head.weight.normal_(std=0.3)
        head.weight[:known] = model.lm_head.weight[:known]
    model.lm_head = head
    return model


@pytest.mark.parametrize("draft", ["none", "ngram", "self"])
@pytest.mark.parametrize("rule", ["coupled", "resampled"])
def test_a_model_that_says_what_it_cannot_read(draft, rule):
    """It may end a text so. Nobody drafts it, since it would have to be read."""
    model, prompt, said = with_logits(sized(NARROW), 280), prompt_with([], 60), [20, 21, 270]
    prompt[prompt >= NARROW] = 7
    options = {"prefix_allowed_tokens_fn": stateless(Sequence(60, said)), "max_new_tokens": 3}
    with TriForce(model, draft=draft, rule=rule, **SMALL) as engine:
        assert engine.generate(prompt, temperature=1.0, seed=0, **options).token_ids == said
        assert engine.generate(prompt, do_sample=False, **options).token_ids == greedy(model, prompt, 3, **options)


@pytest.mark.parametrize("draft", ["none", "ngram", "self"])
def test_a_model_that_reads_what_it_cannot_say(draft):
    """Ids of images, say: look-up finds them in the prompt, and does not draft them."""
    model, prompt = with_logits(sized(WIDE), 290), prompt_with([*range(2, 90, 4)])
    for rule in ("coupled", "resampled"):
        with TriForce(model, draft=draft, rule=rule, **SMALL) as engine:
            assert engine.generate(prompt, max_new_tokens=NEW, do_sample=False).token_ids == greedy(model, prompt, NEW)
