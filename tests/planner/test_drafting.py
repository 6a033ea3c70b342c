"""What `auto` drafts with: the MTP head where a card has room for it beside the retrieval cache, else look-up."""

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from offload_triforce.config import Settings
from offload_triforce.machine.cards import find_card
from offload_triforce.machine.hardware import of_card
from offload_triforce.machine.packages import reads_mtp_heads
from offload_triforce.model.layout import probe
from offload_triforce.model.loader import load_model
from offload_triforce.model.mtp_files import forget_head
from offload_triforce.model.names import find_known
from offload_triforce.model.outline import shape_of_known
from offload_triforce.planner import drafting
from offload_triforce.planner.drafting import choose_draft, head_pays
from offload_triforce.planner.query import PlanQuery
from offload_triforce.planner.report import best_ms, make_report
from offload_triforce.planner.wording import command, notes
from offload_triforce.runtime import drafters
from tests.byte_tokenizer import byte_tokenizer
from tests.mtp import needs_heads, save_with_head


def ask(card, context, head="int8"):
    shape = shape_of_known(find_known("qwen3.6-27b")).quantized("nf4", head)
    return PlanQuery(shape, context, of_card(find_card(card)), Settings(), (), shape.mtp_head, "mtp")


def test_little_room_for_a_head_beside_the_retrieval_cache():
    """A 27B on 16 GB: with its head there is room for shorter paths alone."""
    asked = ask("RTX 5070 Ti", 131072)
    chosen = choose_draft(asked)
    assert (chosen.draft, chosen.draft_kind) == (None, "ngram")
    assert chosen.auto.size == 2 * asked.model.mtp.weights(2, None).parameters
    assert chosen.auto.with_lookup < 0.95 * chosen.auto.with_head
    report = make_report(chosen)
    assert report.way == "hierarchy"
    assert report.ms_per_token == chosen.auto.with_lookup
    assert make_report(asked).ms_per_token == chosen.auto.with_head
    assert "--draft ngram" in command(report), "the engine is told, whatever it would take by itself"
    (said,) = [note for note in notes(report) if "--draft auto" in note]
    assert said.startswith("--draft auto takes look-up alone: ")
    assert "where the MTP head (0.85 GB) would take" in said


def test_room_for_a_head():
    chosen = choose_draft(ask("RTX 4090", 262144, None))
    assert chosen.draft_kind == "mtp"
    assert chosen.auto.with_head < chosen.auto.with_lookup
    report = make_report(chosen)
    assert "--draft" not in command(report)
    assert any(note.startswith("--draft auto takes the MTP head (0.85 GB): ") for note in notes(report))


def test_what_is_faster_is_taken_and_what_does_not_fit_is_not(monkeypatch):
    asked = ask("RTX 4090", 131072)
    for times, head in (((5.0, 6.0), True), ((6.0, 5.0), False), ((5.0, 5.0), True)):
        monkeypatch.setattr(drafting, "best_ms", lambda question, t=times: t[question.draft is None])
        assert (choose_draft(asked).draft is not None) == head
    for times, head in (((None, 9.0), False), ((9.0, None), True), ((None, None), True)):
        monkeypatch.setattr(drafting, "best_ms", lambda question, t=times: t[question.draft is None])
        assert (choose_draft(asked).draft is not None) == head


def test_a_model_without_a_head_is_not_asked_about():
    asked = replace(ask("RTX 4090", 131072), draft=None, draft_kind="ngram")
    assert choose_draft(asked) is asked


def test_nothing_fits():
    asked = ask("RTX 5070 Ti", 131072, None)
    asked = replace(asked, machine=replace(asked.machine, memory=8 << 30))
    assert best_ms(asked) is None
    assert any(note.startswith("neither the MTP head") for note in notes(make_report(choose_draft(asked))))


@pytest.fixture
def loaded(tmp_path):
    folder = save_with_head(tmp_path / "whole")
    byte_tokenizer().save_pretrained(folder)
    model, _ = load_model(str(folder), torch.float32, torch.device("cpu"))
    return model, probe(model)


@needs_heads
@pytest.mark.skipif(not reads_mtp_heads(), reason="this release of transformers reads no MTP heads")
def test_the_engine_asks_the_same(loaded, monkeypatch):
    """With the memory that is free and what the model has taken of it."""
    model, layout = loaded
    machine, asked = of_card(find_card("RTX 4090")), []
    monkeypatch.setattr("offload_triforce.planner.choose.this_machine", lambda device: machine)
    monkeypatch.setattr("offload_triforce.planner.choose.free_on", lambda device: 10**9)

    def note(question, answer):
        asked.append(question)
        return SimpleNamespace(draft=answer)

    for answer in (None, "a head"):
        monkeypatch.setattr(drafting, "choose_draft", lambda question, answer=answer: note(question, answer))
        assert head_pays(model, layout, Settings(budget=64), 999) == (answer is not None)
    (question, _) = asked
    assert question.context == 999
    assert question.draft.weights.parameters > 0
    assert question.draft_kind == "mtp"
    assert question.machine.memory > 10**9
    assert set(question.fixed) == {"budget", "gamma", "gamma1"}


@needs_heads
@pytest.mark.parametrize(
    ("device", "context", "pays", "head"),
    [("cuda", 999, False, False), ("cuda", 999, True, True), ("cuda", None, False, True), ("cpu", 999, False, True)],
)
def test_the_engine_follows(device, context, pays, head, loaded, monkeypatch):
    """Where the longest text is known, and on a card."""
    model, layout = loaded
    monkeypatch.setattr(drafters, "head_pays", lambda *_: pays)
    monkeypatch.setattr(drafters, "load_head", lambda model: "a head")
    there = replace(layout, device=torch.device(device))
    assert (drafters._head_of(model, there, Settings(context=context)) is not None) == head


@needs_heads
@pytest.mark.skipif(not reads_mtp_heads(), reason="this release of transformers reads no MTP heads")
def test_without_a_longest_text_each_size_of_caches_decides(loaded, monkeypatch):
    """Nothing is read before a text comes; what does not pay for a longer one goes before its caches are made."""
    model, layout = loaded
    there, asked = replace(layout, device=torch.device("cuda")), []

    def pays(model, layout, settings, context):
        asked.append(context)
        return context < 1000

    monkeypatch.setattr(drafters, "head_pays", pays)
    forget_head(model)
    made = drafters.Drafters("auto", model, there, None, None, Settings())
    assert (made.head, made.lookup, made.bytes_to_come, asked) == (None, True, 0, [])
    made.settle(999)
    assert made.head is not None
    assert made.bytes_to_come > 0
    gone = weakref.ref(made.head.module)
    made.settle(2000)
    assert (made.head, made.bytes_to_come, asked) == (None, 0, [999, 2000])
    gc.collect()
    assert gone() is None, "its memory is free"
    made.settle(500)
    assert made.head is not None
    told = drafters.Drafters("auto", model, there, None, None, Settings(context=999))
    assert told.head is not None
    told.settle(2000)
    assert told.head is not None, "what is known from the beginning stays"
