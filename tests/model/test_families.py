"""Greedy equals transformers' own generate, token for token in fp32, for every family and every kind of draft."""

import copy
from functools import cache

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria

from offload_triforce import InputError, Settings, TriForce
from tests.byte_tokenizer import byte_tokenizer
from tests.tiny import FAMILIES, disturbed, greedy, prompt_ids, tiny_model
from tests.usual import sampled

PROMPT, NEW = 300, 141  # ends in another tile, two tiles later
DRAFTS = ("model", "self", "ngram", "none")
UNEVEN = ("gemma4", "gemma4-shared")  # heads of several sizes: no streaming cache holds them
SMALL = {"chunk": 4, "sink": 4, "recent": 16, "tile": 64, "draft_cache": 64, "prefill_chunk": 100}
SETTINGS = (
    Settings(**SMALL, budget=64, gamma=3, gamma1=2),
    Settings(**{**SMALL, "chunk": 8, "sink": 8, "recent": 24, "prefill_chunk": 37}, budget=96, gamma=5, gamma1=3),
    Settings(**{**SMALL, "sink": 8, "recent": 32, "prefill_chunk": 512}, budget=128, gamma=8, gamma1=4, resident=0.3),
    Settings(**{**SMALL, "chunk": 8, "sink": 8}, budget=64, gamma=4, gamma1=6, ring=1),
)


@cache
def model_of(family, calm):
    return tiny_model(family, seed=1 if family in ("llama", "qwen3-moe", "gemma3", "qwen3-next") else 0, calm=calm)


@cache
def expected_of(family, calm):
    answer = greedy(model_of(family, calm), prompt_ids(PROMPT), NEW)
    # A model that repeats one token would make every test here pass.
    assert len(set(answer[-100:])) > 5, (family, calm)
    return answer


def draft_of(kind, model):
    return disturbed(model, 0.03) if kind == "model" else kind


def every_pair():
    """Families and drafts; the normal run takes one draft for each family, and each draft as often as any other."""
    for i, family in enumerate(FAMILIES):
        drafts = [draft for draft in DRAFTS if family not in UNEVEN or draft in ("ngram", "none")]
        for draft in drafts:
            usual = draft == drafts[i % len(drafts)]
            yield pytest.param(family, draft, marks=() if usual else pytest.mark.slow)


@pytest.mark.parametrize(("family", "draft"), list(every_pair()))
def test_greedy_equals_transformers(family, draft):
    """Tiles, write-back, sliding windows, refreshes and draft refills all come up within these tokens."""
    calm = draft != "none"
    model, expected = model_of(family, calm), expected_of(family, calm)
    settings = SETTINGS[(list(FAMILIES).index(family) + DRAFTS.index(draft)) % len(SETTINGS)]
    # How often a draft is asked must not depend on how busy this machine is.
    with TriForce(model, draft=draft_of(draft, model), settings=settings, draft_cost=0.05) as engine:
        result = engine.generate(prompt_ids(PROMPT), max_new_tokens=NEW, do_sample=False)
        full_layers = bool(engine.layout.full)
    assert result.token_ids == expected
    # Else the test would say nothing about accepting, rejecting and taking back.
    drafted, middle = result.stats.draft, result.stats.retrieval
    assert middle.accepted > 0
    assert middle.accepted < middle.judged or not full_layers  # with sliding layers alone both levels see the same
    assert (drafted.judged > 0) == (draft != "none")
    if draft in ("model", "self"):
        assert 0 < drafted.accepted < drafted.judged


@pytest.mark.parametrize(("family", "resident"), sampled(["qwen2-sliding", "gemma3"], [0.0, 0.5, 1.0], share=2))
def test_resident_share_changes_nothing(family, resident):
    with TriForce(
        model_of(family, True), draft="self", settings=SETTINGS[1], resident=resident, link_gbps=1000
    ) as engine:
        result = engine.generate(prompt_ids(PROMPT), max_new_tokens=NEW, do_sample=False)
    assert result.token_ids == expected_of(family, True)
    assert (result.stats.link_bytes == 0) == (resident == 1.0)


@pytest.mark.parametrize(("family", "tokens"), sampled(UNEVEN, [1, 3, 20, 38, 65, 150], share=2))
def test_heads_of_several_sizes(family, tokens):
    """Prompts on both sides of the window and of a tile; layers that read keys and values of earlier ones."""
    model, prompt = model_of(family, True), prompt_ids(tokens, seed=tokens)
    with TriForce(model, draft="ngram", settings=SETTINGS[tokens % 2], context=256) as engine:
        result = engine.generate(prompt, max_new_tokens=60, do_sample=False)
    assert result.token_ids == greedy(model, prompt, 60)
    assert result.stats.retrieval.judged > 0


def test_heads_of_several_sizes_make_no_draft():
    with pytest.raises(InputError, match="differ in KV heads or head dimension"):
        TriForce(model_of("gemma4", True), draft="self", settings=SETTINGS[0])


def test_draft_of_another_family():
    """A draft shares nothing with the target but its vocabulary."""
    small = tiny_model("gemma3", seed=5, num_hidden_layers=1, layer_types=["sliding_attention"])
    with TriForce(model_of("llama", True), draft=small, settings=SETTINGS[3]) as engine:
        result = engine.generate(prompt_ids(PROMPT), max_new_tokens=80, do_sample=False)
    assert result.token_ids == expected_of("llama", True)[:80]
    assert result.stats.draft.judged > 0


def test_no_sink():
    with TriForce(model_of("llama", True), draft="ngram", settings=SETTINGS[0], sink=0) as engine:
        result = engine.generate(prompt_ids(PROMPT), max_new_tokens=NEW, do_sample=False)
    assert result.token_ids == expected_of("llama", True)


@pytest.mark.parametrize("gamma", [0, 1, 2])
def test_few_draft_tokens(gamma):
    with TriForce(model_of("llama", True), draft="self", settings=SETTINGS[0], gamma=gamma, gamma1=1) as engine:
        result = engine.generate(prompt_ids(PROMPT), max_new_tokens=NEW, do_sample=False)
    assert result.token_ids == expected_of("llama", True)
    assert result.stats.passes == NEW if gamma == 0 else result.stats.passes < NEW


@pytest.mark.parametrize(("family", "context"), sampled(["llama-yarn", "gemma3"], [None, 600], share=2))
def test_one_engine_many_prompts(family, context):
    """Nothing of one text is left for the next, whether the caches are kept or made anew for a longer one."""
    model = model_of(family, True)
    with TriForce(model, draft="self", settings=SETTINGS[0], context=context) as engine:
        for tokens in (130, 41, 330, 41):
            prompt = prompt_ids(tokens, seed=tokens)
            assert engine.generate(prompt, max_new_tokens=70, do_sample=False).token_ids == greedy(model, prompt, 70)


@pytest.mark.parametrize(("tokens", "draft"), sampled([1, 2, 3, 7, 19, 20, 21, 64, 65], DRAFTS, share=2))
def test_short_prompts(tokens, draft):
    """Shorter than the sink, than sink and recent window, and around one tile."""
    family = ("llama", "gemma3", "mistral-sliding")[tokens % 3]
    model, prompt = model_of(family, True), prompt_ids(tokens, seed=tokens)
    with TriForce(model, draft=draft_of(draft, model), settings=SETTINGS[0], context=128) as engine:
        assert engine.generate(prompt, max_new_tokens=40, do_sample=False).token_ids == greedy(model, prompt, 40)


@pytest.mark.parametrize("family", ["llama-longrope", "phi3-longrope"])
@pytest.mark.parametrize(("tokens", "new"), [(100, 28), (129, 60), (128, 0)])
def test_longrope_on_both_sides_of_its_switch(family, tokens, new):
    """128 tokens use the short factors, 129 the long ones; a text that crosses is refused before any work."""
    model, prompt = model_of(family, True), prompt_ids(tokens)
    with TriForce(model, draft="self", settings=SETTINGS[0]) as engine:
        if new:
            result = engine.generate(prompt, max_new_tokens=new, do_sample=False)
            assert result.token_ids == greedy(model, prompt, new)
            return
        with pytest.raises(InputError, match="longrope changes its frequencies at 128 tokens"):
            engine.generate(prompt, max_new_tokens=1, do_sample=False)
        with pytest.raises(InputError, match="at most 28 new tokens"):
            engine.generate(prompt_ids(100), max_new_tokens=29, do_sample=False)


PROCESSED = {
    "repetition penalty": {"repetition_penalty": 1.3},
    "no repeated trigrams": {"no_repeat_ngram_size": 3},
    "bad words and a least length": {"bad_words_ids": [[5], [6, 7]], "min_new_tokens": 40, "eos_token_id": [11, 12]},
    "suppressed": {"suppress_tokens": list(range(20, 40)), "begin_suppress_tokens": list(range(40, 60))},
    "forced": {"forced_eos_token_id": 17, "sequence_bias": [[[9], 2.0]]},
}


@pytest.mark.parametrize(
    ("processors", "where"), sampled([*PROCESSED], ["options", "generation_config", "model defaults"], share=3)
)
def test_processors(processors, where, monkeypatch):
    """The answer depends on each position's own prefix, and the settings come from where transformers takes them."""
    options = PROCESSED[processors]
    model, prompt = model_of("qwen3", True), prompt_ids(PROMPT)
    expected = greedy(model, prompt, 60, **options)
    assert expected != expected_of("qwen3", True)[:60]
    given = {"max_new_tokens": 60, "do_sample": False}
    if where == "options":
        given |= options
    elif where == "generation_config":
        given = {"generation_config": GenerationConfig(**given, **options)}
    else:
        defaults = GenerationConfig(**options, do_sample=True, temperature=0.6, top_k=20, top_p=0.9)
        monkeypatch.setattr(model, "generation_config", defaults)
    with TriForce(model, draft="self", settings=SETTINGS[0]) as engine:
        result = engine.generate(prompt, **given)
    assert result.token_ids == expected
    assert 0 < result.stats.retrieval.accepted < result.stats.retrieval.judged


def test_eos_cuts_in_the_middle_of_a_block():
    """Wherever the end token comes in a pass, nothing after it is kept."""
    model, prompt, expected = model_of("gemma3", True), prompt_ids(PROMPT), expected_of("gemma3", True)[:90]
    cut_short = 0
    with TriForce(model, draft="self", settings=SETTINGS[2]) as engine:
        for eos in sorted(set(expected))[::3]:
            result = engine.generate(prompt, max_new_tokens=90, do_sample=False, eos_token_id=eos)
            assert result.token_ids == expected[: expected.index(eos) + 1]
            stats = result.stats
            assert stats.new_tokens == len(result.token_ids)
            cut_short += stats.new_tokens < stats.retrieval.accepted + stats.passes
    assert cut_short > 2


@pytest.mark.parametrize("new", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 23])
def test_max_new_tokens_cuts(new):
    model, prompt = model_of("gemma3", True), prompt_ids(PROMPT)
    with TriForce(model, draft="self", settings=SETTINGS[2]) as engine:
        by_new = engine.generate(prompt, max_new_tokens=new, do_sample=False)
        by_length = engine.generate(prompt, max_length=PROMPT + new, do_sample=False)
    assert by_new.token_ids == by_length.token_ids == expected_of("gemma3", True)[:new]


def test_stop_strings_cut():
    """A stop string may end inside of a block, and inside of a token that goes on after it."""
    model, tokenizer = tiny_model("gemma3", vocab_size=259), byte_tokenizer()
    prompt = prompt_ids(PROMPT)
    answer = greedy(model, prompt, 120)
    stops = [tokenizer.decode(answer[i : i + 2]) for i in range(10, 110, 9)]
    stops = [stop for stop in stops if stop.isascii() and len(stop) == 2]
    assert len(stops) > 2
    with TriForce(model, tokenizer, draft="self", settings=SETTINGS[2]) as engine:
        for stop in stops:
            options = {"stop_strings": [stop, "never said"]}
            result = engine.generate(prompt, max_new_tokens=120, do_sample=False, **options)
            assert result.token_ids == greedy(model, prompt, 120, tokenizer=tokenizer, **options)
            assert len(result.token_ids) < 120
            assert result.text.endswith(stop)


class SumOfTokens(StoppingCriteria):
    """Stops at the first prefix whose ids sum up to a multiple of ten: it has to see each prefix by itself."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.sum(dim=1) % 10 == 0


def test_stopping_criteria_see_every_prefix():
    model = model_of("gemma3", True)
    for seed in range(6):
        prompt = prompt_ids(80, seed)
        with TriForce(model, draft="self", settings=SETTINGS[2]) as engine:
            options = {"stopping_criteria": [SumOfTokens()], "max_new_tokens": 60, "do_sample": False}
            assert engine.generate(prompt, **options).token_ids == greedy(model, prompt, 60, **options)


@pytest.mark.parametrize("family", ["mixtral", "gemma3"])
def test_eager_reference(family):
    """The reference does not depend on which of its own attentions transformers takes."""
    model = copy.deepcopy(model_of(family, True))
    model.set_attn_implementation("eager")
    assert greedy(model, prompt_ids(PROMPT), NEW) == expected_of(family, True)


@pytest.mark.slow  # in the normal run, ``expected_of`` looks at those that are compared with
@pytest.mark.parametrize("calm", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_say_something(family, calm):
    assert len(expected_of(family, calm)) == NEW


def test_bfloat16_runs():
    """No exact promise between two orders of summation in bf16, but the first tokens agree and none is lost."""
    model, prompt = tiny_model("llama").to(torch.bfloat16), prompt_ids(PROMPT)
    with TriForce(model, draft="self", settings=SETTINGS[1]) as engine:
        result = engine.generate(prompt, max_new_tokens=40, do_sample=False)
    assert len(result.token_ids) == 40
    assert result.token_ids[:3] == greedy(model, prompt, 3)
