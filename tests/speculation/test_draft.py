"""Level 0: the look-up against brute force, the draft model against dense forward passes."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from speculation_toys import tiny_llama
from transformers import LogitsProcessorList, MistralConfig, MistralForCausalLM
from transformers.generation import TemperatureLogitsWarper

from offload_triforce.cache.streaming import StreamingCache
from offload_triforce.config import Settings
from offload_triforce.errors import InputError
from offload_triforce.model.adapter import attached
from offload_triforce.model.layout import probe
from offload_triforce.speculation.draft import ModelDraft, NgramDraft, NoDraft, longest_match
from offload_triforce.speculation.sampling import RandomChoices, Sampler
from offload_triforce.speculation.text import TokenText

CPU = torch.device("cpu")
VOCABULARY = 6


def text_of(ids, room=0):
    return TokenText(torch.tensor(ids), len(ids) + room)


def brute_force(ids, shortest, longest, limit):
    """What the docstring says: longest first, and of equals the newest."""
    for length in range(min(longest, len(ids) - 1), shortest - 1, -1):
        for start in range(len(ids) - length - 1, -1, -1):
            if ids[start : start + length] == ids[len(ids) - length :]:
                return ids[start + length :][:limit]
    return []


@settings(max_examples=500)
@given(
    st.integers(1, 3).flatmap(lambda tokens: st.lists(st.integers(0, tokens), min_size=1, max_size=30)),
    st.integers(1, 4),
    st.integers(0, 6),
    st.integers(0, 5),
)
def test_longest_match_is_brute_force(ids, shortest, more, limit):
    """Few different tokens, so that there are many occurrences, and some overlap with the ending."""
    longest = shortest + more
    expected = brute_force(ids, shortest, longest, limit)
    assert longest_match(torch.tensor(ids).numpy(), shortest, longest, limit) == expected


@pytest.mark.parametrize(
    ("ids", "shortest", "longest", "limit", "expected"),
    [
        pytest.param([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], 2, 32, 4, [9, 2, 3, 8], id="longest wins over newest"),
        pytest.param([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], 2, 2, 1, [8], id="newest, of those that count"),
        pytest.param([1, 2, 3, 4, 5, 3], 2, 32, 4, [], id="too short an ending"),
        pytest.param([1, 2, 3, 4, 5, 3], 1, 32, 2, [4, 5], id="one token is enough if one says so"),
        pytest.param([7, 7, 7, 7], 2, 32, 5, [7], id="overlapping itself"),
        pytest.param([5], 1, 32, 4, [], id="a single token"),
        pytest.param([5, 5], 1, 32, 0, [], id="no room"),
    ],
)
def test_longest_match_by_hand(ids, shortest, longest, limit, expected):
    assert longest_match(torch.tensor(ids).numpy(), shortest, longest, limit) == expected


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_ngram_rows_are_one_hot(limit):
    text = text_of([1, 2, 3, 4, 5, 0, 1, 2], room=limit)
    rows = NgramDraft(VOCABULARY, CPU).propose(text, limit)
    assert text[8:] == [3, 4, 5][:limit]
    assert rows.dtype == torch.float32
    assert torch.equal(rows, torch.eye(VOCABULARY)[text[8:]])


def test_ngram_without_a_match_guesses_nothing():
    text = text_of([1, 2, 3, 4])
    assert NgramDraft(VOCABULARY, CPU).propose(text, 3).shape == (0, VOCABULARY)
    assert text[:] == [1, 2, 3, 4]


@pytest.mark.parametrize("draft", [NoDraft(VOCABULARY, CPU), NgramDraft(VOCABULARY, CPU)])
def test_nothing_to_forget(draft):
    draft.keep(3)
    draft.settle()


def test_no_draft_guesses_nothing():
    text = text_of([1, 2, 1])
    assert NoDraft(VOCABULARY, CPU).propose(text, 5).shape == (0, VOCABULARY)
    assert text[:] == [1, 2, 1]


class Dense:
    """The draft as it is documented: which tokens it holds, and a plain forward pass over all of them.

    It holds the text until the cache is full; then the sink and the newest tokens, three quarters of a cache.
    """

    def __init__(self, model, sampler, capacity, sink):
        self.model, self.sampler, self.capacity, self.sink = copy.deepcopy(model), sampler, capacity, sink
        self.keep_tokens = capacity - max(1, capacity // 4)
        self.held, self.refills = [], 0

    def row(self, tokens):
        """The distribution after all of ``tokens``."""
        unread = range(self.held[-1] + 1 if self.held else 0, len(tokens))
        self.held += unread
        if len(self.held) > self.capacity:
            self.refills += 1
            newest = max(self.sink, len(tokens) - self.keep_tokens + self.sink)
            self.held = [*range(self.sink), *range(newest, len(tokens))]
        ids = torch.tensor([[tokens[i] for i in self.held]])
        logits = self.model(ids, use_cache=False).logits[0, -1:]
        return self.sampler.distributions(logits, torch.tensor(tokens), len(tokens))

    def keep(self, length):
        self.held = [i for i in self.held if i < length]


def mistral(window):
    torch.manual_seed(3)
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=window,
        initializer_range=0.5,
        attn_implementation="eager",
    )
    return MistralForCausalLM(config).eval()


MODELS = {"llama": lambda: tiny_llama(layers=2), "sliding window": lambda: mistral(5)}


class Recorder(RandomChoices):
    """Remembers what it was asked to draw from."""

    def __init__(self, seed):
        super().__init__(seed, CPU)
        self.rows = []

    def draw(self, distribution):
        self.rows.append(distribution.clone())
        return super().draw(distribution)


class Pair:
    """A ModelDraft and its dense twin, led through the same life as in ``hierarchy``."""

    def __init__(self, name, capacity, sink, prompt, room=0, seed=0):
        model = MODELS[name]()
        sampler = Sampler(LogitsProcessorList([TemperatureLogitsWarper(0.8)]), True, VOCABULARY)
        layout, shape = probe(model), probe(model).layers[0]
        cache = StreamingCache(
            len(layout.layers), shape.kv_heads, shape.head_dim, capacity, sink, layout.dtype, CPU
        )
        self.choices, self.chance = Recorder(seed), random.Random(seed)
        self.draft = ModelDraft(model, layout, cache, sampler, self.choices)
        self.dense = Dense(model, sampler, capacity, sink)
        self.text = TokenText(torch.randint(VOCABULARY, (prompt,)), prompt + room)
        self.worst = 0.0

    @torch.no_grad()
    def propose(self, limit):
        """One proposal; both must have the same distributions for it."""
        start = len(self.text)
        self.choices.rows.clear()
        with attached(self.draft.model):
            rows = self.draft.propose(self.text, limit)
        assert rows.shape == (limit, VOCABULARY)
        assert len(self.text) == start + limit
        assert all(map(torch.equal, rows, self.choices.rows)), "reported other rows than were drawn from"
        for n, row in enumerate(rows, start):
            self.worst = max(self.worst, float((self.dense.row(self.text[:n]) - row).abs().max()))

    def keep(self, length):
        """The verdict of the level above, and the token it adds."""
        self.text.truncate(length)
        self.draft.keep(length)
        self.dense.keep(length)
        self.text.append([self.chance.randrange(VOCABULARY)])

    def one_pass(self, gamma, gamma1):
        """Rounds of level 1 until it has ``gamma`` guesses, and then the target's verdict."""
        start = len(self.text)
        while len(self.text) < start + gamma:
            before = len(self.text)
            self.propose(min(gamma1, start + gamma - before - 1))
            self.keep(self.chance.randint(before, len(self.text)))
        self.keep(self.chance.randint(start, len(self.text)))
        self.draft.settle()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("capacity", "sink", "gamma", "gamma1", "prompt", "tokens"),
    [
        (16, 2, 4, 2, 60, 2000),
        (17, 0, 6, 3, 1, 600),
        (40, 4, 14, 4, 40, 600),
        (4, 0, 0, 4, 9, 300),
        (8, 1, 1, 4, 3, 300),
        (12, 0, 4, 9, 12, 300),
    ],
)
def test_model_draft_is_dense_over_what_it_holds(name, capacity, sink, gamma, gamma1, prompt, tokens):
    """Before and after refills, with guesses forgotten at random; also in the smallest caches allowed."""
    Settings(draft_cache=capacity, draft_sink=sink, gamma=gamma, chunk=1, sink=0)
    pair = Pair(name, capacity, sink, prompt, room=tokens + 2 * gamma + 2)
    while len(pair.text) < prompt + tokens:
        pair.one_pass(gamma, gamma1)
        if gamma < 2:  # the draft was not asked for a guess
            pair.propose(1)
            pair.keep(len(pair.text) - pair.chance.randrange(2))
            pair.draft.settle()
    assert pair.worst < 1e-5
    assert pair.dense.refills > tokens // capacity


def test_a_short_text_is_the_plain_model():
    """Nothing is skipped while the text fits: the draft is the model itself."""
    pair = Pair("llama", capacity=64, sink=4, prompt=10, room=60)
    for _ in range(8):
        start = len(pair.text)
        pair.propose(4)
        rows = torch.stack(pair.choices.rows)
        with torch.no_grad():
            logits = pair.dense.model(pair.text.ids[None]).logits[0, start - 1 : -1]
        assert torch.allclose(rows, torch.softmax(logits / 0.8, -1), atol=1e-5)
        pair.keep(start + 2)
        pair.draft.settle()
    assert pair.dense.refills == 0


def test_a_long_prompt_is_not_read_in_full():
    """Of a text of 3000 tokens, the first proposal reads the sink and the newest."""
    pair = Pair("llama", capacity=16, sink=2, prompt=3000, room=10)
    pair.propose(1)
    assert pair.worst < 1e-5
    assert pair.draft.cache.length == 12
    assert pair.draft.cache.text == 3000


def test_a_cache_without_a_window_is_refused():
    with pytest.raises(InputError, match="no room for a recent window beside 6 sink tokens"):
        StreamingCache(1, 1, 8, 8, 6, torch.float32, CPU)
