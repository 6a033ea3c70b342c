"""Input embeddings in host memory: a model reads the same, whoever runs it and however; or they stay where they lie."""

from __future__ import annotations

import copy

import pytest
import torch

from offload_triforce import Settings, TriForce
from offload_triforce.errors import InputError
from offload_triforce.model.embeddings import HostEmbedding, embed, host_table, own_embedding
from offload_triforce.model.layout import probe
from offload_triforce.model.shape import shape_of, shape_of_loaded
from offload_triforce.model.to_host import move_embeddings
from tests.graphs.replay import replaying
from tests.tiny import FAMILIES, build, greedy, prompt_ids, tiny_config, tiny_model

SETTINGS = Settings(chunk=4, sink=4, recent=8, tile=16, gamma=6, prefill_chunk=33, draft_cache=64, budget=80)


def moved(family="llama", **changes):
    model = tiny_model(family, **changes)
    assert move_embeddings(model) is None
    return model


SCALING = {"gemma2", "gemma3", "gemma4", "gemma4-shared"}  # their table is no plain one


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - SCALING))
def test_every_family_says_the_same(family):
    """Greedy, token for token, through the prefill and passes; drafting with the model's own weights as well."""
    model, prompt = tiny_model(family), prompt_ids(90)
    expected = greedy(model, prompt, 12)
    draft = "ngram" if "longrope" in family else "ngram+self"
    with TriForce(model, draft=draft, settings=Settings(**{**vars(SETTINGS), "embeddings": "host"})) as engine:
        assert isinstance(model.get_input_embeddings(), HostEmbedding)
        assert engine.generate(prompt, max_new_tokens=12, do_sample=False).token_ids == expected
    assert greedy(model, prompt, 12) == expected, "others may use the model as ever"


@pytest.mark.parametrize("family", sorted(SCALING))
def test_a_table_that_scales_stays(family):
    with pytest.raises(InputError, match="or no plain table; leave embeddings out, or take 'device'"):
        TriForce(tiny_model(family), embeddings="host")


def test_no_bit_of_the_logits_changes():
    model = tiny_model()
    other = copy.deepcopy(model)
    move_embeddings(other)
    with torch.no_grad():
        assert torch.equal(model(prompt_ids(40)).logits, other(prompt_ids(40)).logits)
    assert torch.equal(embed(other, [5, 3, 5]), model.get_input_embeddings()(torch.tensor([5, 3, 5])))
    assert embed(model, [5, 3, 5]) is None


def test_the_table_is_no_parameter():
    """A model is where its parameters are, and graphs are captured where all of them are on the device."""
    model = moved()
    table = model.get_input_embeddings()
    assert not list(table.parameters())
    assert not list(table.buffers())
    assert (table.num_embeddings, table.embedding_dim) == tuple(table.weight.shape)
    assert move_embeddings(model) is None, "moved already"
    assert model.get_input_embeddings() is table


def test_tied_embeddings_stay():
    model = build("Llama", tie_word_embeddings=True)
    assert "output embeddings too" in move_embeddings(model)
    with pytest.raises(InputError, match="input embeddings of LlamaForCausalLM are the output embeddings too"):
        TriForce(model, embeddings="host")
    assert host_table(model) is None


class Scaled(torch.nn.Embedding):
    def forward(self, ids):
        return 3 * super().forward(ids)


def _another_kind(model):
    own = model.model.embed_tokens
    model.model.embed_tokens = Scaled(*own.weight.shape, _weight=own.weight)


def _hooked(model):
    table = model.model.embed_tokens
    table.forward = lambda ids, own=table.forward: 2 * own(ids)


@pytest.mark.parametrize("change", [_another_kind, _hooked])
def test_embeddings_that_do_more_than_look_up_stay(change):
    model = tiny_model()
    change(model)
    assert own_embedding(model) is None
    assert move_embeddings(model) is not None
    assert host_table(model) is None


def test_a_model_that_does_more_with_its_ids_keeps_them():
    """Found out by running it, whatever the reason: its first layer would get something else."""
    model = tiny_model()
    forward = model.model.forward

    def by_id(input_ids=None, inputs_embeds=None, **others):
        if input_ids is not None:
            inputs_embeds = model.model.embed_tokens(input_ids) + input_ids[..., None]
        return forward(inputs_embeds=inputs_embeds, **others)

    model.model.forward = by_id
    own = model.get_input_embeddings()
    assert "does more with its token ids" in move_embeddings(model)
    assert model.get_input_embeddings() is own


def test_a_model_that_takes_ids_alone_keeps_them():
    model = tiny_model()
    forward = model.model.forward
    model.model.forward = lambda input_ids, **others: forward(input_ids=input_ids, **others)
    assert "does more with its token ids" in move_embeddings(model)


def test_steps_that_are_replayed_find_new_rows(monkeypatch):
    """Level 1's and the draft's graphs read rows from a fixed place."""
    replaying(monkeypatch)
    model, prompt = tiny_model(calm=True), prompt_ids(120)
    expected = greedy(model, prompt, 40)

    def answer():
        with TriForce(model, draft="self", settings=Settings(**{**vars(SETTINGS), "embeddings": "host"})) as engine:
            result = engine.generate(prompt, max_new_tokens=40, do_sample=False)
            return result, engine.runtime.graphs

    result, graphs = answer()
    assert result.token_ids == expected
    assert any(graph.trusted for graph in graphs.graphs.values())
    rows = HostEmbedding.rows
    monkeypatch.setattr(HostEmbedding, "rows", lambda self, ids, out=None: rows(self, ids) if out is None else out)
    with pytest.warns(RuntimeWarning, match="computed something else"):  # the old rows are still in their place
        result, graphs = answer()
    assert result.token_ids == expected, "such a graph is never trusted"


def test_planned_bytes_are_those_of_the_table():
    for family, (prefix, changes) in FAMILIES.items():
        model = tiny_model(family)
        planned = shape_of(tiny_config(prefix, **changes), torch.float32).embedding
        assert planned == (0 if family in SCALING else model.get_input_embeddings().weight.nbytes), family
        assert shape_of_loaded(model, probe(model)).embedding == 0, "it stays where it is"
    assert shape_of(tiny_config("Llama", tie_word_embeddings=True), torch.float32).embedding == 0


@pytest.mark.gpu
def test_on_a_gpu_the_table_stays_in_host_memory():
    model = tiny_model().to("cuda")
    expected = greedy(model, prompt_ids(120).cuda(), 24)
    with TriForce(model, settings=Settings(**{**vars(SETTINGS), "embeddings": "host"})) as engine:
        assert model.get_input_embeddings().weight.device.type == "cpu"
        assert engine.generate(prompt_ids(120), max_new_tokens=24, do_sample=False).token_ids == expected
