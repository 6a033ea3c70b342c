"""Level 0: the look-up against brute force, the draft model against StreamingLLM written out plainly."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, MistralConfig, MistralForCausalLM
from transformers.generation import TemperatureLogitsWarper
from transformers.models.llama.modeling_llama import rotate_half

from offload_triforce.cache.streaming import StreamingCache
from offload_triforce.config import Settings
from offload_triforce.model.adapter import attached
from offload_triforce.model.layout import probe
from offload_triforce.model.rotary import KeyTurner
from offload_triforce.runtime.model_drafter import ModelDrafter
from offload_triforce.speculation.acceptance import Coupled, DraftToken, Resampled
from offload_triforce.speculation.ngram import NgramDrafter, longest_match
from offload_triforce.speculation.noise import Noise
from offload_triforce.speculation.place import Place
from offload_triforce.speculation.sampling import RandomChoices, Sampler
from offload_triforce.speculation.text import TokenText
from tests.speculation.speculation_toys import tiny_llama

CPU = torch.device("cpu")
VOCABULARY = 6


def text_of(ids, room=0):
    return TokenText(torch.tensor(ids), len(ids) + room)


def brute_force(ids, shortest, longest):
    """What the docstring says: longest first, and of equals the newest."""
    for length in range(min(longest, len(ids) - 1), shortest - 1, -1):
        for start in range(len(ids) - length - 1, -1, -1):
            if ids[start : start + length] == ids[len(ids) - length :]:
                return length, start + length
    return 0, 0


@settings(max_examples=250)
@given(
    st.integers(1, 3).flatmap(lambda tokens: st.lists(st.integers(0, tokens), min_size=1, max_size=30)),
    st.integers(1, 4),
    st.integers(0, 6),
)
def test_longest_match_is_brute_force(ids, shortest, more):
    """Few different tokens, so that there are many occurrences, and some overlap with the ending."""
    longest = shortest + more
    assert longest_match(torch.tensor(ids).numpy(), shortest, longest) == brute_force(ids, shortest, longest)


def ngram(ids, count, shortest=2, longest=32, vocabulary=100):
    """Kind and tokens of what is drafted."""
    draft, text = NgramDrafter(vocabulary, shortest, longest), text_of(ids)
    kind = draft.offer(text)
    drafted = draft.draft(text, count) if kind else []
    assert text[:] == ids
    assert all(draft_token.q is None for draft_token in drafted)
    return kind, [draft_token.token for draft_token in drafted]


@pytest.mark.parametrize(
    ("ids", "shortest", "longest", "count", "expected"),
    [
        pytest.param(
            [1, 2, 3, 9, 2, 3, 8, 1, 2, 3], 2, 32, 4, ("ngram 4", [9, 2, 3, 8]), id="longest wins over newest"
        ),
        pytest.param([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], 2, 2, 1, ("ngram 2", [8]), id="newest, of those that count"),
        pytest.param([1, 2, 3, 4, 5, 3], 2, 32, 4, (None, []), id="too short an ending"),
        pytest.param([1, 2, 3, 4, 5, 3], 1, 32, 2, ("ngram 2", [4, 5]), id="one token is enough if one says so"),
        pytest.param([7, 7, 7, 7], 2, 32, 5, ("ngram 4", [7]), id="overlapping itself"),
        pytest.param([5], 1, 32, 4, (None, []), id="a single token"),
        pytest.param([1, 2, 3, 1, 2], 2, 32, 0, ("ngram 2", []), id="no room"),
        pytest.param([*range(20), 50, *range(20)], 2, 32, 2, ("ngram 32", [50, 0]), id="a long match is a sure one"),
        pytest.param([1, 2, 3, 4, 1, 2], 2, 32, 3, ("ngram 2", [3, 4, 1]), id="into the ending itself"),
    ],
)
def test_ngram_by_hand(ids, shortest, longest, count, expected):
    assert ngram(ids, count, shortest, longest) == expected


def test_ngram_never_drafts_what_the_model_cannot_say():
    """A prompt may hold ids that have no logit."""
    assert ngram([1, 2, 3, 90, 5, 1, 2], 4, vocabulary=50) == ("ngram 2", [3])


class Reference:
    """StreamingLLM at its plainest: keys are kept unturned, and turned to their place in the cache at every step.

    Which tokens are held is the draft's to decide: the sink, and everything after the tokens it has left out.
    """

    def __init__(self, model, sampler, sink):
        self.model, self.sampler, self.sink = copy.deepcopy(model), sampler, sink
        self.held = []  # positions in the text
        self.kv = [None] * model.config.num_hidden_layers  # per layer, [2, K, held, D]

    def row(self, tokens, left_out):
        """The distribution after ``tokens``, of which ``left_out`` after the sink are not to be seen (any more)."""
        unread = range(self.held[-1] + 1 if self.held else 0, len(tokens))
        self._drop([i for i in self.held if i < self.sink or i >= self.sink + left_out])
        new = [i for i in unread if i < self.sink or i >= self.sink + left_out]
        self.held += new
        logits = self._forward(torch.tensor([tokens[i] for i in new]))
        place = Place(lambda device: torch.tensor(tokens), len(tokens))
        return torch.softmax(self.sampler.draft_scores(logits[-1:], [place]), dim=-1)

    def keep(self, length):
        self._drop([i for i in self.held if i < length])

    def _drop(self, stay):
        index = [self.held.index(i) for i in stay]
        self.kv = [kv if kv is None else kv[:, :, index] for kv in self.kv]
        self.held = stay

    def _forward(self, ids):
        base = self.model.model
        hidden, positions = base.embed_tokens(ids), torch.arange(len(self.held))
        cos, sin = base.rotary_emb(hidden, positions[None])
        for index, layer in enumerate(base.layers):
            attention = layer.self_attn
            x = layer.input_layernorm(hidden)
            query, key, value = (
                projection(x).unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            new = torch.stack([key, value])
            held = new if self.kv[index] is None else torch.cat([self.kv[index], new], dim=2)
            self.kv[index] = held
            key = held[0] * cos + rotate_half(held[0]) * sin
            query = query * cos[:, -len(ids) :] + rotate_half(query) * sin[:, -len(ids) :]
            back = positions[-len(ids) :, None] - positions
            seen = (back >= 0) & (back < (getattr(self.model.config, "sliding_window", None) or len(positions)))
            mixed = torch.nn.functional.scaled_dot_product_attention(
                query[None], key[None], held[1][None], attn_mask=seen, enable_gqa=True
            )
            hidden = hidden + attention.o_proj(mixed[0].transpose(0, 1).flatten(1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.model.lm_head(base.norm(hidden))


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


MODELS = {
    "one layer": lambda: tiny_llama(),
    "llama": lambda: tiny_llama(layers=3),
    "sliding window": lambda: mistral(5),
}


class Recorder(RandomChoices):
    """Remembers what it was asked to draw from, and what the cache had left out at that time."""

    def __init__(self, seed):
        super().__init__(seed, CPU)
        self.cache, self.drawn = None, []

    def draw(self, distribution):
        self.drawn.append((distribution.clone(), self.cache.skipped))
        return super().draw(distribution)


class Pair:
    """A ModelDrafter and its reference, led through the same life as under level 1."""

    def __init__(self, name, capacity, sink, prompt, room=0, seed=0):
        model = MODELS[name]()
        layout, self.choices, self.chance = probe(model), Recorder(seed), random.Random(seed)
        self.sampler = Sampler(LogitsProcessorList([TemperatureLogitsWarper(0.8)]), True, VOCABULARY)
        shape = (len(layout.layers), layout.layers[0].kv_heads, layout.layers[0].head_dim, capacity, sink)
        cache = StreamingCache(*shape, KeyTurner(model).turn, layout.dtype, CPU)
        self.choices.cache = cache
        self.draft = ModelDrafter(model, cache, Resampled(self.sampler, self.choices))
        self.reference = Reference(model, self.sampler, sink)
        self.text = TokenText(torch.randint(VOCABULARY, (prompt,)), prompt + room)
        self.worst = 0.0

    @torch.no_grad()
    def propose(self, limit):
        """Draft tokens; both must have the same distributions for them. They are put at the end of the text."""
        start, before = len(self.text), self.text[:]
        self.choices.drawn.clear()
        with attached(self.draft.model):
            drafted = self.draft.draft(self.text, limit)
        assert self.text[:] == before
        assert len(drafted) == limit
        self.text.append([draft_token.token for draft_token in drafted])
        for n, draft_token, (drawn, left_out) in zip(
            range(start, start + limit), drafted, self.choices.drawn, strict=True
        ):
            assert torch.equal(draft_token.q, drawn), "reported another row than was drawn from"
            self.check(self.text[:n], draft_token.q, left_out)

    def check(self, tokens, row, left_out):
        expected = self.reference.row(tokens, left_out)[0]
        self.worst = max(self.worst, float((expected - row).abs().max()))
        held, capacity = len(self.reference.held), self.draft.cache.capacity
        assert min(len(tokens), capacity // 2) <= held <= capacity  # what made room for rejected tokens stays out

    def keep(self, length):
        """The verdict of the level above, and the token it adds. The draft finds out by itself."""
        self.text.truncate(length)
        self.reference.keep(length)
        self.text.append([self.chance.randrange(VOCABULARY)])

    def one_pass(self, gamma, gamma1):
        """Steps of level 1 until it has ``gamma`` draft tokens, now and then on another branch; then a verdict."""
        start = len(self.text)
        while len(self.text) < start + gamma:
            before = len(self.text)
            self.propose(min(gamma1, start + gamma - before - 1))
            self.keep(self.chance.randint(before, len(self.text)))
            if self.chance.random() < 0.1:
                self.keep(self.chance.randint(start, len(self.text) - 1))
        self.keep(self.chance.randint(start, len(self.text)))
        self.text.decide()


@pytest.mark.parametrize("name", ["llama", "sliding window"])
@pytest.mark.parametrize(
    ("capacity", "sink", "gamma", "gamma1", "prompt", "tokens"),
    [
        (48, 4, 12, 4, 60, 200),
        (16, 2, 4, 2, 60, 250),
        (17, 0, 6, 3, 1, 180),
        (36, 4, 12, 4, 36, 120),
        (4, 0, 0, 4, 9, 150),
        (8, 1, 1, 4, 3, 150),
        (12, 0, 4, 9, 12, 120),
        pytest.param(48, 4, 12, 4, 60, 700, marks=pytest.mark.slow),
        pytest.param(16, 2, 4, 2, 60, 1500, marks=pytest.mark.slow),
    ],
)
def test_model_draft_is_streaming_llm(name, capacity, sink, gamma, gamma1, prompt, tokens):
    """Through many evictions, draft tokens forgotten at random; also with the smallest caches that are allowed."""
    Settings(draft_cache=capacity, draft_sink=sink, gamma=gamma, chunk=1, sink=0)
    pair = Pair(name, capacity, sink, prompt, room=tokens + 2 * gamma + 2)
    while len(pair.text) < prompt + tokens:
        pair.one_pass(gamma, gamma1)
        if gamma < 2:  # the drafter was not asked for a token
            pair.propose(1)
            pair.keep(len(pair.text) - pair.chance.randrange(2))
            pair.text.decide()
    assert pair.worst < 1e-4
    assert pair.draft.cache.skipped > tokens - capacity


def test_asked_twice_about_the_same_text():
    """Its last token is read again: also where the text has not grown since it was begun."""
    pair = Pair("llama", capacity=64, sink=4, prompt=10, room=60)
    rows = []
    for _ in range(2):
        pair.propose(2)
        rows.append(torch.stack([row for row, _ in pair.choices.drawn])[0])
        pair.text.truncate(10)
        pair.reference.keep(9)
    torch.testing.assert_close(*rows)
    assert pair.worst < 1e-5


def test_draft_tokens_that_are_taken_back_right_after_a_text_was_begun():
    """The draft is first asked behind draft tokens of others; of which, when it is asked again, some are gone."""
    pair = Pair("llama", capacity=16, sink=2, prompt=40, room=20)
    for drafted, kept in ((3, 41), (2, 42), (0, 41)):
        pair.text.append([1] * drafted)
        pair.propose(1)
        pair.text.truncate(kept)
        pair.reference.keep(kept - 1)
    pair.propose(1)
    assert pair.worst < 1e-5


def test_one_layer_is_the_plain_model_over_what_is_held():
    """With one layer no key has seen evicted tokens: transformers' own forward over the held tokens, contiguously."""
    pair = Pair("one layer", capacity=16, sink=2, prompt=40, room=500)
    for _ in range(60):
        start = len(pair.text)
        pair.propose(3)
        for n, (row, left_out) in zip(range(start, start + 3), pair.choices.drawn, strict=True):
            tokens = pair.text[:2] + pair.text[2 + left_out : n]
            with torch.no_grad():
                logits = pair.reference.model(torch.tensor([tokens])).logits[0, -1:]
            assert torch.allclose(row, torch.softmax(logits / 0.8, -1)[0], atol=1e-5)
        pair.keep(start + 1)
        pair.text.decide()


def test_a_short_text_is_the_plain_model():
    """Nothing is left out while the text fits: the draft is the model itself."""
    pair = Pair("llama", capacity=64, sink=4, prompt=10, room=60)
    for _ in range(8):
        start = len(pair.text)
        pair.propose(4)
        rows = torch.stack([row for row, _ in pair.choices.drawn])
        with torch.no_grad():
            logits = pair.reference.model(pair.text.ids[None]).logits[0, start - 1 : -1]
        assert torch.allclose(rows, torch.softmax(logits / 0.8, -1), atol=1e-5)
        pair.keep(start + 2)
        pair.text.decide()
    assert pair.draft.cache.skipped == 0


def test_a_long_prompt_is_not_read_in_full():
    """Of a text of 3000 tokens, the first proposal reads what fits the cache."""
    pair = Pair("llama", capacity=16, sink=2, prompt=3000, room=10)
    pair.propose(1)
    assert pair.worst < 1e-5
    assert 12 <= pair.draft.cache.length <= 16
    assert pair.draft.cache.text == 3000


def test_drawing_is_only_from_the_targets_vocabulary():
    """A drafter with padding tokens of its own never drafts them."""
    pair = Pair("llama", capacity=16, sink=2, prompt=5, room=40)
    pair.sampler.vocabulary = VOCABULARY - 2
    with attached(pair.draft.model), torch.no_grad():
        drafted = pair.draft.draft(pair.text, 10)
    assert all(draft_token.q.shape == (VOCABULARY - 2,) for draft_token in drafted)
    assert max(draft_token.token for draft_token in drafted) < VOCABULARY - 2


def test_coupled_draft_tokens_take_the_noise_of_their_places():
    """So does level 1: that is what makes the two agree."""
    pair, noise = Pair("llama", capacity=64, sink=4, prompt=10, room=60), Noise(3, 10, VOCABULARY, CPU)
    pair.draft.rule = Coupled(pair.sampler, Noise(3, 10, VOCABULARY, CPU))
    with attached(pair.draft.model), torch.no_grad():
        drafted = pair.draft.draft(pair.text, 6)
    ids = pair.text[:]
    for draft_token in drafted:
        with torch.no_grad():
            logits = pair.reference.model(torch.tensor([ids])).logits[0, -1]
        assert draft_token == DraftToken(int((logits / 0.8 + noise.at(len(ids))).argmax()), None)
        ids.append(draft_token.token)


@pytest.mark.parametrize("eos", [None, 4, [77, 3]])
def test_ids_that_a_draft_does_not_know(eos):
    """It reads the end of a text in their place (or token 0), and drafts nothing right behind one."""
    pair = Pair("llama", capacity=64, sink=4, prompt=10, room=60)
    model = pair.draft.model
    model.config.eos_token_id = eos
    draft = ModelDrafter(model, pair.draft.cache, pair.draft.rule)
    text = text_of([1, 2, 90, 3, 5, 6, 4], room=20)
    assert draft.offer(text) == "model"
    with attached(model), torch.no_grad():
        draft_token = draft.draft(text, 1)[0]
    other = 3 if isinstance(eos, list) else eos or 0
    with torch.no_grad():
        logits = pair.reference.model(torch.tensor([[1, 2, other, 3, 5, other, 4]])).logits[0, -1:]
    assert torch.allclose(draft_token.q, torch.softmax(logits[0] / 0.8, -1), atol=1e-5)
    text.append([VOCABULARY])
    assert draft.offer(text) is None
    text.append([1])
    assert draft.offer(text) == "model"
    with attached(model), torch.no_grad():
        assert len(draft.draft(text, 3)) == 3


def test_a_draft_that_says_what_it_cannot_read_stops_there():
    pair = Pair("llama", capacity=64, sink=4, prompt=10, room=60)
    model = pair.draft.model
    with torch.no_grad():
        head = torch.nn.Linear(model.config.hidden_size, VOCABULARY + 2, bias=False)
        head.weight.zero_()
    model.lm_head, pair.sampler.vocabulary, pair.sampler._readable = head, VOCABULARY + 2, VOCABULARY + 2
    pair.draft.rule = Coupled(pair.sampler, Noise(3, 10, VOCABULARY + 2, CPU))
    lengths = set()
    with attached(model), torch.no_grad():
        for _ in range(12):
            drafted = [draft_token.token for draft_token in pair.draft.draft(pair.text, 4)]
            assert all(token < VOCABULARY for token in drafted[:-1])
            assert len(drafted) == 4 or drafted[-1] >= VOCABULARY
            lengths.add(len(drafted))
            pair.text.append([1])
            pair.text.decide()
    assert len(lengths) > 1
