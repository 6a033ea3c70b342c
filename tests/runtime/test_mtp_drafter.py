"""MTP drafts: nothing that is said changes, and what is drafted is what the head itself would say."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_triforce import TriForce
from offload_triforce.cache.hidden import HiddenWindow
from offload_triforce.runtime.levels import RetrievalLevel
from offload_triforce.runtime.mtp_drafter import MtpDrafter
from offload_triforce.speculation.tree import chain
from tests.graphs.replay import replaying
from tests.mtp import OTHERS, load, needs_heads, save_with_head
from tests.runtime.test_ways import ways
from tests.tiny import greedy, prompt_ids
from tests.usual import sampled

pytestmark = needs_heads
PROMPT, NEW = 179, 42
SMALL = {"budget": 64, "sink": 8, "recent": 16, "tile": 32, "draft_cache": 64, "prefill_chunk": 100}
# Levels 0 and 1 see everything: what they draft can be computed plainly.
WHOLE = {**SMALL, "budget": 256, "bits": 16, "draft_cache": 512, "gamma": 6, "adaptive": False, "draft_tokens": 16}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(save_with_head(tmp_path_factory.mktemp("head")))


@pytest.fixture(scope="module")
def plain(model):
    """By temperature and seed: transformers' own where it is greedy; else our decoding without draft tokens."""
    said = {}

    def of(temperature, seed):
        if (temperature, seed) not in said:
            if temperature == 0:
                said[temperature, seed] = greedy(model, prompt_ids(PROMPT), NEW)
            else:
                said[temperature, seed] = answer(model, temperature, seed, draft="none", gamma=0).token_ids
        return said[temperature, seed]

    return of


def answer(model, temperature=0.0, seed=0, prompt=PROMPT, **way):
    with TriForce(model, **{**SMALL, **way}) as engine:
        options = {"max_new_tokens": NEW, "temperature": temperature, "seed": seed}
        return engine.generate(prompt_ids(prompt), **options)


@settings(deadline=None, max_examples=8)
@given(ways(), st.sampled_from(["mtp", "mtp+ngram", "auto"]), st.sampled_from([0.0, 0.7, 1.3]), st.integers(0, 1))
def test_any_way_is_plain_decoding(model, plain, way, draft, temperature, seed):
    assert answer(model, temperature, seed, draft=draft, **way).token_ids == plain(temperature, seed)


@pytest.mark.parametrize(("draft", "temperature"), sampled(["mtp", "mtp+ngram"], [0.0, 0.9], share=2))
def test_large_trees_and_drafting_ahead(model, plain, draft, temperature):
    way = {"gamma": 48, "draft_tokens": 192, "draft_cost": 0.01, "overlap": True}
    result = answer(model, temperature, draft=draft, **way)
    assert result.token_ids == plain(temperature, 0)
    assert result.stats.steps_ahead > 0
    assert result.stats.by_drafter["mtp"].proposed > 20


@pytest.mark.parametrize("family", OTHERS)
def test_other_families(family, tmp_path, monkeypatch):
    """Heads with experts, and those whose weights lie behind the model's last layer."""
    model, drafted = load(save_with_head(tmp_path, family)), Drafted(monkeypatch)
    result = answer(model, draft="mtp", **WHOLE)
    assert result.token_ids == greedy(model, prompt_ids(PROMPT), NEW)
    same, number = agreement(model, drafted.drafts)
    assert same == number > 20


def test_without_draft_tokens(model, plain):
    result = answer(model, draft="mtp", gamma=0)
    assert result.token_ids == plain(0.0, 0)
    assert result.stats.by_drafter == {}


@pytest.mark.parametrize("prompt", [1, 2, 3, 9, 63, 101])
def test_short_prompts(model, prompt):
    """Down to one token, before which there is no hidden state: the first draft token comes after the first pass."""
    way = {"draft": "mtp", "adaptive": False, "gamma": 5}
    result = answer(model, prompt=prompt, **way)
    assert result.token_ids == greedy(model, prompt_ids(prompt), NEW)
    assert result.stats.by_drafter["mtp"].proposed > 20


def test_replayed_steps_tell_the_same(model, plain, monkeypatch):
    """Level 1 as captured steps: its hidden states come out of them, and the same draft tokens follow."""
    way = {"draft": "mtp", "adaptive": False, "gamma": 6, "draft_tokens": 16, "topk": 2, "width": 2, "overlap": False}
    drafted = Drafted(monkeypatch)
    expected = answer(model, **way)
    plainly, drafted.drafts = drafted.drafts, []
    captures = replaying(monkeypatch)
    result = answer(model, **way)
    assert sum(sum(capture.replays) for capture in captures) > 20
    assert result.token_ids == expected.token_ids == plain(0.0, 0)
    assert [made for _, made in drafted.drafts] == [made for _, made in plainly]


def test_hidden_states_outlive_the_step():
    """A captured step leaves them where the next one will: level 1 keeps copies."""
    level = RetrievalLevel(None, SimpleNamespace(hidden=object(), recurrent=None))
    level._nodes, rows = chain([5, 6]), torch.ones(2, 4)
    level.see(rows)
    rows.zero_()
    assert [node.state.hidden.sum() for node in level._nodes] == [4, 4]


# --- what is drafted


class Drafted:
    """What ``MtpDrafter`` did: each draft with the text that it was made for, and each step of the head."""

    def __init__(self, monkeypatch):
        self.drafts, self.steps, self.pairs = [], [], {}
        draft, read = MtpDrafter.draft, MtpDrafter._read

        def noting(drafter, text, count, before=None):
            made = draft(drafter, text, count, before)
            if made:
                self.drafts.append((text.ids.clone(), [token.token for token in made]))
            return made

        def noting_step(drafter, tokens, hidden):
            logits, own = read(drafter, tokens, hidden)
            cache, rows = drafter.cache, list(zip(tokens, hidden, strict=True))
            if cache.length == len(tokens):
                self.pairs.clear()
            slots = [slot if slot < cache.sink else slot + cache.skipped for slot in range(cache.length)]
            self.pairs.update(zip(slots[-len(rows) :], rows, strict=True))
            self.steps.append((cache.skipped, [self.pairs[slot] for slot in slots], logits))
            return logits, own

        monkeypatch.setattr(MtpDrafter, "draft", noting)
        monkeypatch.setattr(MtpDrafter, "_read", noting_step)


@torch.no_grad()
def head_on(module, ids, hidden):
    """transformers' own head on a whole sequence: ids [n] and the hidden states [n, width] before each of them."""
    places = torch.arange(1, len(ids) + 1)[None]
    return module.forward_layer(0, hidden[None], places, None, input_ids=ids[None])


@torch.no_grad()
def reference(model, module, ids, count):
    """What the head drafts after a text, step by step over all of it, without any cache."""
    hidden = model.get_decoder()(ids[None]).last_hidden_state[0, :-1]
    drafted = []
    for _ in range(count):
        made = head_on(module, torch.cat([ids[1:], torch.tensor(drafted, dtype=torch.long)]), hidden)
        drafted.append(int(module._project_to_logits(made[:, -1]).argmax()))
        hidden = torch.cat([hidden, made[0, -1:]])
    return drafted


def agreement(model, drafts):
    with TriForce(model, draft="mtp") as engine:
        module = engine._drafters.head.module
    same = [reference(model, module, ids, len(drafted)) == drafted for ids, drafted in drafts]
    return sum(same), len(same)


def test_it_drafts_what_the_head_says_of_the_whole_text(model, monkeypatch):
    """After decided tokens and after draft tokens in the tree: levels 1 and 2 see the same here."""
    drafted = Drafted(monkeypatch)
    answer(model, draft="mtp", **WHOLE)
    same, number = agreement(model, drafted.drafts)
    assert same == number > 20


@pytest.mark.parametrize("shift", ["committed", "along the path"])
def test_shifted_hidden_states_show(model, plain, monkeypatch, shift):
    """A mutation: the hidden state of the token before. Nothing that is said changes; the test above would fail."""
    drafted = Drafted(monkeypatch)
    if shift == "committed":
        see = HiddenWindow.see
        monkeypatch.setattr(HiddenWindow, "see", lambda window, rows: see(window, rows.roll(1, dims=0)))
    else:
        see = RetrievalLevel.see
        monkeypatch.setattr(RetrievalLevel, "see", lambda level, rows: see(level, rows.roll(1, dims=0)))
    assert answer(model, draft="mtp", **WHOLE).token_ids == plain(0.0, 0)
    same, number = agreement(model, drafted.drafts)
    assert same < number


def test_a_long_text_is_read_through_a_window(model, monkeypatch):
    """Behind the sink, tokens are left out, and the window moves: each step is the head over what is held then."""
    drafted = Drafted(monkeypatch)
    answer(model, draft="mtp", **{**WHOLE, "draft_cache": 32, "budget": 64})
    with TriForce(model, draft="mtp") as engine:
        module = engine._drafters.head.module
    assert len({skipped for skipped, _, _ in drafted.steps}) > 3
    for _, pairs, logits in drafted.steps:
        made = head_on(module, torch.tensor([token for token, _ in pairs]), torch.stack([row for _, row in pairs]))
        torch.testing.assert_close(logits, module._project_to_logits(made[:, -1]), rtol=1e-3, atol=1e-3)


def test_sessions_of_one_engine_keep_apart(model):
    """A second text after a first: its drafts are those of a fresh engine."""
    way = {**SMALL, "gamma": 5, "adaptive": False, "overlap": False}
    options = {"max_new_tokens": NEW, "do_sample": False}
    with TriForce(model, draft="mtp", context=300, **way) as engine:
        engine.generate(prompt_ids(PROMPT, seed=1), **options)
        second = engine.generate(prompt_ids(90, seed=2), **options)
    with TriForce(model, draft="mtp", context=300, **way) as engine:
        alone = engine.generate(prompt_ids(90, seed=2), **options)
    assert second.token_ids == alone.token_ids
    assert second.stats.draft == alone.stats.draft


def test_another_engine_of_the_model_is_not_disturbed(model):
    """The decoder tells whoever asks; an engine without a head does not."""
    with TriForce(model, draft="mtp", **SMALL), TriForce(model, draft="ngram", **SMALL) as other:
        result = other.generate(prompt_ids(PROMPT), max_new_tokens=NEW, do_sample=False)
        assert other.runtime.caches.hidden is None
    assert result.token_ids == greedy(model, prompt_ids(PROMPT), NEW)
