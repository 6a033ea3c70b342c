"""Logits processors of any kind: what comes out is what ``generate`` of transformers gives, called as it calls them."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from transformers.generation import SynthIDTextWatermarkingConfig

from offload_triforce import (
    GrammarProcessor,
    InputError,
    TriForce,
    UnsupportedModelError,
    forkable,
    stateless,
    triforce_generate,
)
from offload_triforce.speculation.tree_drafter import TreeDrafter
from tests.matchers import END, ComputingMatcher, FillingMatcher
from tests.stateful import Counting, Forking, ForkingSuccessor, Fussy, Moody, Sequence, Successor
from tests.tiny import VOCABULARY, disturbed, greedy, tiny_model
from tests.usual import sampled

pytestmark = pytest.mark.filterwarnings("ignore:drafts are made without")

SMALL = {"budget": 48, "gamma1": 2, "chunk": 4, "sink": 4, "recent": 16, "tile": 16, "draft_cache": 64}
FIXED = {"gamma": 5, "adaptive": False, "overlap": False}
WAYS = {
    "plain": {"gamma": 0},
    "chain": {**FIXED, "topk": 1, "width": 1},
    "tree": {**FIXED, "draft_tokens": 16, "topk": 3, "width": 3},
    "ahead": {"gamma": 5, "draft_tokens": 16, "topk": 3, "width": 3, "draft_cost": 0.01},
}
DRAFTS = ("none", "ngram", "self", "model")
# Each draft and each way, but not each with each: ``tests/runtime/test_ways.py`` draws from all of them.
PAIRS = (("none", "tree"), ("ngram", "chain"), ("self", "tree"), ("model", "ahead"))

PROMPT = torch.tensor([[5, 6, 7, 11, 12, 40, 41, 42, 8, 9] * 12])
SAID = [11, 12, 13, 14, 15, 16, 17, 18]
NEW = 16


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", seed=1, calm=True)


@pytest.fixture(scope="module")
def answer(model):
    """Answers of engines that are made once for each draft, way and rule."""
    engines, worse = {}, disturbed(model, 0.05)

    def ask(draft, way, rule="coupled", **options):
        if (draft, way, rule) not in engines:
            chosen = worse if draft == "model" else draft
            engines[draft, way, rule] = TriForce(model, draft=chosen, rule=rule, **SMALL, **WAYS[way])
        return engines[draft, way, rule].generate(PROMPT, **options)

    yield ask
    for engine in engines.values():
        engine.close()


def by(processor):
    return {"logits_processor": [processor]}


def allowing(function):
    return {"prefix_allowed_tokens_fn": function, "max_new_tokens": len(SAID)}


# What may be brought along: options of ``generate``, made anew for each call; and what drafts have to do without.
BROUGHT = {
    "counts its calls": (lambda: by(Counting()), ["Counting"]),
    "counts its calls, forks": (lambda: by(Forking()), []),
    "counts its calls, copied": (lambda: by(forkable(Counting())), []),
    "goes by earlier scores": (lambda: by(Moody()), []),
    "beside others": (lambda: {**by(Counting()), "repetition_penalty": 1.3, "no_repeat_ngram_size": 3}, ["Counting"]),
    "a function": (lambda: by(lambda ids, scores: scores - 0.02 * torch.arange(VOCABULARY)), ["<lambda>"]),
    "raises off its path": (lambda: by(Fussy("raises")), []),
    "leaves nothing off its path": (lambda: by(Fussy("nothing")), []),
    "no numbers off its path": (lambda: by(Fussy("nan")), []),
    "prefix": (lambda: allowing(Sequence(120, SAID)), ["Sequence"]),
    "prefix, declared": (lambda: allowing(stateless(Sequence(120, SAID))), []),
    "prefix that counts its calls": (lambda: allowing(Successor()), ["Successor"]),
    "prefix that forks": (lambda: allowing(ForkingSuccessor()), []),
    "grammar, filling": (lambda: by(GrammarProcessor(FillingMatcher(90), 90)), []),
    "grammar, computing": (lambda: by(GrammarProcessor(ComputingMatcher(90), 90)), []),
    "SynthID": (lambda: {"watermarking_config": SynthIDTextWatermarkingConfig(keys=[3, 5], ngram_len=3)}, []),
}


def options_of(brought):
    return {"max_new_tokens": NEW, "eos_token_id": END, **BROUGHT[brought][0]()}


@pytest.fixture(scope="module")
def expected_of(model, answer):
    """Answers without drafts, each made once: greedy ones by transformers, at a temperature by plain decoding."""

    @cache
    def find(brought, **sampling):
        if not sampling:
            return greedy(model, PROMPT, NEW, **options_of(brought))
        return answer("none", "plain", **sampling, **options_of(brought)).token_ids

    return find


@pytest.mark.parametrize(
    ("brought", "draft", "way"), sampled([*BROUGHT], [("none", "plain"), ("ngram", "ahead"), *PAIRS], share=3)
)
def test_greedy_is_transformers_own(answer, expected_of, brought, draft, way):
    """Token for token, whoever drafts and however. It says what drafts had to do without."""
    result = answer(draft, way, do_sample=False, **options_of(brought))
    assert result.token_ids == expected_of(brought)
    assert result.stats.as_dict()["target_only"] == (BROUGHT[brought][1] if way != "plain" else [])


@pytest.mark.parametrize(("brought", "draft", "way"), sampled([*BROUGHT], PAIRS, share=2))
def test_sampling_is_plain_decoding_with_the_same_seed(answer, expected_of, brought, draft, way):
    options = {"temperature": 1.2, "seed": 7}
    assert answer(draft, way, **options, **options_of(brought)).token_ids == expected_of(brought, **options)


@pytest.mark.parametrize("brought", ["counts its calls", "counts its calls, forks"])
@pytest.mark.parametrize("rule", ["coupled", "resampled"])
def test_calls_are_those_of_generate(model, answer, brought, rule):
    """Once per token, in the order of the text, up to the last one and no further: ends may come at any place."""
    mine = options_of(brought)
    greedy(model, PROMPT, NEW, **mine)
    expected = mine["logits_processor"][0].seen
    for seed, (draft, way) in enumerate(PAIRS):
        ours = options_of(brought)
        answer(draft, way, rule, do_sample=False, **ours)
        assert ours["logits_processor"][0].seen == expected
        ours = {**options_of(brought), "eos_token_id": [2, 13, 37, 60, 77]}
        ids = answer(draft, way, rule, temperature=1.5, seed=seed, **ours).sequences[0].tolist()
        assert ours["logits_processor"][0].seen == [ids[:length] for length in range(120, len(ids))]


@pytest.mark.parametrize(("draft", "way"), PAIRS)
def test_resampling_keeps_to_what_is_allowed(answer, draft, way):
    """Also where the draft's path is an error, and where it leaves nothing."""
    options = {"temperature": 1.2, "seed": 3}
    for brought in ("prefix", "prefix, declared"):
        assert answer(draft, way, "resampled", **options, **options_of(brought)).token_ids == SAID
    for brought in ("counts its calls", "counts its calls, forks"):
        tokens = answer(draft, way, "resampled", **options, **options_of(brought)).token_ids
        assert all((token >= VOCABULARY // 2) != number % 2 for number, token in enumerate(tokens))
    for brought in ("raises off its path", "leaves nothing off its path", "no numbers off its path"):
        tokens = answer(draft, way, "resampled", **options, **options_of(brought)).token_ids
        assert all(sum(token % 2 for token in tokens[end - 3 : end]) < 3 for end in range(3, len(tokens) + 1))
    matcher = FillingMatcher(90)
    for token in answer(draft, way, "resampled", **options, **options_of("grammar, computing")).token_ids:
        assert matcher.take(token)


def test_drafts_keep_to_what_they_may_call(answer):
    """A fork makes drafts that fit: fewer passes than without. Both are exact, see above."""
    passes = {
        brought: sum(
            answer("none", "chain", temperature=1.0, seed=seed, **options_of(brought)).stats.passes for seed in range(4)
        )
        for brought in (
            "counts its calls",
            "counts its calls, forks",
            "prefix that counts its calls",
            "prefix that forks",
        )
    }
    assert passes["counts its calls, forks"] < 0.9 * passes["counts its calls"]
    assert passes["prefix that forks"] < passes["prefix that counts its calls"]


def test_as_a_decoding_method_of_transformers(model):
    """What is found out about processors is the same there; so is the warning."""
    ours = {"custom_generate": triforce_generate, "return_dict_in_generate": True}
    with pytest.warns(RuntimeWarning, match="drafts are made without Counting"):
        output = model.generate(PROMPT, do_sample=False, max_new_tokens=NEW, **by(Counting()), **ours)
    assert output.sequences[0, 120:].tolist() == greedy(model, PROMPT, NEW, **by(Counting()))
    assert output.triforce_stats.target_only == ("Counting",)


# --- where nothing can follow


@pytest.mark.parametrize("draft", DRAFTS)
def test_nothing_is_left_to_say(model, answer, draft):
    """Greedy decoding takes token 0 then, as transformers does; drawing is refused in words, where it fails there."""
    options = {"max_new_tokens": 24, "no_repeat_ngram_size": 1, "suppress_tokens": [*range(18, VOCABULARY)]}
    expected = greedy(model, PROMPT, 24, **options)
    assert expected.count(0) > 10
    for way in ("plain", "tree", "ahead"):
        assert answer(draft, way, do_sample=False, **options).token_ids == expected
    for way, rule in (("chain", "resampled"), ("tree", "coupled"), ("ahead", "resampled")):
        with pytest.raises(InputError, match=r"rule out every token after the first \d+ tokens; let them leave"):
            answer(draft, way, rule, temperature=1.0, seed=1, **options)


@pytest.mark.parametrize("function", [Sequence, lambda *args: stateless(Sequence(*args))])
def test_an_error_on_the_text_itself_is_the_user_s(model, function):
    """Raised as transformers raises it. A stream has had all tokens that came before."""
    options = {"max_new_tokens": NEW, "do_sample": False}
    with pytest.raises(ValueError, match="returned an empty list") as theirs:
        model.generate(PROMPT, **options, prefix_allowed_tokens_fn=function(120, SAID))
    for draft, way in (("none", "plain"), ("none", "tree"), ("ngram", "ahead")):
        with TriForce(model, draft=draft, **SMALL, **WAYS[way]) as engine:
            stream = engine.stream(PROMPT, **options, prefix_allowed_tokens_fn=function(120, SAID))
            with pytest.raises(ValueError, match="returned an empty list") as ours:
                list(stream)
        assert str(ours.value) == str(theirs.value)
        assert stream.result.token_ids == SAID
        assert stream.stats.new_tokens == len(SAID)


def broken(model, token):
    """A copy that computes no numbers once it has read a token."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan
    return model


@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"temperature": 1.0, "seed": 1}])
@pytest.mark.parametrize("rule", ["coupled", "resampled"])
def test_a_model_that_computes_no_numbers_is_named(model, rule, sampling):
    said = stateless(Sequence(120, [11, 12, 60, *range(61, 80)]))
    with TriForce(broken(model, 60), draft="ngram", rule=rule, **SMALL, **WAYS["tree"]) as engine:
        stream = engine.stream(PROMPT, max_new_tokens=9, prefix_allowed_tokens_fn=said, **sampling)
        with pytest.raises(UnsupportedModelError, match=r"after the first 123 tokens are not numbers \(NaN\)") as error:
            list(stream)
    assert "\n" not in str(error.value)
    assert stream.result.token_ids == [11, 12, 60]


def test_a_draft_token_without_numbers_does_not_spoil_the_answer(model, monkeypatch):
    """It is drafted, and never said. In a pass, what is no number makes all others none."""
    drafted = set()
    pick = TreeDrafter._pick

    def noting(self):
        block = pick(self)
        drafted.update(node.token for node in block)
        return block

    monkeypatch.setattr(TreeDrafter, "_pick", noting)
    expected = greedy(model, PROMPT, NEW)
    with TriForce(model, draft="none", **SMALL, **WAYS["tree"]) as engine:
        assert engine.generate(PROMPT, max_new_tokens=NEW, do_sample=False).token_ids == expected
    token = min(drafted - {*expected, *PROMPT[0].tolist()})
    with TriForce(broken(model, token), draft="none", **SMALL, **WAYS["tree"]) as engine:
        for options in ({}, {"remove_invalid_values": True}):
            result = engine.generate(PROMPT, max_new_tokens=NEW, do_sample=False, **options)
            assert result.token_ids == expected
            assert result.stats.retrieval.accepted > 0


@pytest.mark.parametrize("rule", ["coupled", "resampled"])
def test_a_draft_that_computes_no_numbers_drafts_nothing(model, rule):
    with TriForce(model, draft=broken(model, 5), rule=rule, **SMALL, **WAYS["tree"]) as engine:
        result = engine.generate(PROMPT, max_new_tokens=NEW, do_sample=False)
        assert result.token_ids == greedy(model, PROMPT, NEW)
        assert result.stats.draft.proposed == 0
        assert len(engine.generate(PROMPT, max_new_tokens=NEW, temperature=1.0).token_ids) == NEW
