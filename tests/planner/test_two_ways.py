"""Plain decoding and the hierarchy, each with its own split of the memory: which to take, and from where on."""

from dataclasses import replace

import pytest
import torch

from offload_triforce import TriForce
from offload_triforce.config import Settings
from offload_triforce.machine.cards import find_card
from offload_triforce.machine.hardware import of_card
from offload_triforce.planner.fit import DEVICE_OVERHEAD, HOST_OVERHEAD, footprint, loading, unpacked_bytes
from offload_triforce.planner.models import find_shape
from offload_triforce.planner.predict import predict_target
from offload_triforce.planner.query import PlanQuery
from offload_triforce.planner.report import make_report
from offload_triforce.planner.wording import as_dict, command, notes, verdict
from tests.tiny import greedy, prompt_ids, tiny_model

GB = 10**9


def ask(name="llama-3.1-8b", context=131072, card="RTX 4090", ram=64, **settings):
    host = None if ram is None else ram * GB
    return PlanQuery(
        find_shape(name), context, of_card(find_card(card), host), Settings(**settings), tuple(settings), source=name
    )


def test_plain_decoding_gets_what_drafting_does_not_take():
    found = make_report(ask())
    drafting, plain = found.hierarchy.used, found.plain.used
    assert found.plain.settings.budget == 8 + 64 + 8
    assert plain.device["retrieval cache"] < 0.1 * drafting.device["retrieval cache"]
    assert plain.device["ring"] == 12 * plain.plan.wire_bytes < drafting.device["ring"]
    assert plain.device["resident tiles"] > drafting.device["resident tiles"] + 0.5 * GB
    assert plain.vram_bytes <= 0.985 * found.question.machine.memory
    alone = predict_target(found.question.model, found.plain.settings, 131072, found.question.machine, 1, False)
    assert found.prediction.plain == alone
    assert found.prediction.plain.link < found.prediction.passing.link


def test_a_budget_is_for_drafting_alone():
    found = make_report(ask(budget=32768))
    assert found.hierarchy.settings.budget == 32768
    assert found.plain.settings.budget == 80


def test_plain_decoding_loads_no_draft_model():
    draft = find_shape("qwen3-0.6b")
    found = make_report(replace(ask("qwen3-8b", 32768), draft=draft, draft_kind="model"))
    assert found.hierarchy.used.device["draft"] > draft.weights.total
    assert "draft" not in found.plain.used.device


def test_where_all_of_it_lies_on_the_card_there_is_no_ring():
    found = make_report(ask(context=16384))
    assert found.plain.on_card
    assert (found.plain.settings.resident, found.plain.settings.ring) == (1.0, 1)
    assert found.plain.used.host["tiles of the full cache"] == 0
    assert found.prediction.plain.link == 0


@pytest.mark.parametrize("gamma", [0, 3])
def test_such_settings_run_and_stay_exact(gamma):
    """A ring of one tile that is never used, and, for plain decoding, the smallest retrieval cache."""
    model, prompt = tiny_model(), prompt_ids(120)
    settings = Settings(gamma=gamma, budget=80 if gamma == 0 else 120, tile=64, ring=1, resident=1.0)
    assert settings.budget >= settings.least_budget == 80
    with TriForce(model, settings=settings) as engine:
        result = engine.generate(prompt, max_new_tokens=16, do_sample=False)
    assert result.token_ids == greedy(model, prompt, 16)
    assert result.stats.link_bytes == 0


class TestWhatToDo:
    """The first sentence, and what stands behind it."""

    def test_a_cache_that_has_to_be_streamed_is_what_it_is_for(self):
        found = make_report(ask())
        said = verdict(found)
        assert found.way == "hierarchy"
        assert said.startswith("Fits: 24.6 GB of 25.1 GB on the card and 10.6 GB of 64.0 GB of host memory; about ")
        assert "tokens per second) through the hierarchy, 6.4 times as fast as plain decoding" in said
        assert said.endswith("which is what this runtime is for.")
        assert found.pays_from is None

    def test_a_short_text_that_fits_the_card_needs_no_such_runtime(self):
        found = make_report(ask(context=6144))
        said = verdict(found)
        assert (found.way, found.settings.gamma) == ("plain", 0)
        assert found.ms_per_token == found.prediction.plain_ms < 1.1 * found.prediction.round.ms_per_token
        assert "which drafting would hardly speed up" in said
        assert said.startswith("Fits on the card as a whole: ")
        assert "any engine that keeps its KV cache on the card serves as well, and this one pays from about" in said
        assert "--gamma 0" in command(found)
        assert "--budget" not in command(found)

    def test_offloading_pays_from_there_on_and_not_before(self):
        found = make_report(ask(context=6144))
        assert found.pays_from % 1024 == 0
        assert make_report(ask(context=found.pays_from)).way == "hierarchy"
        assert make_report(ask(context=found.pays_from - 1024)).way == "plain"
        assert f"from about {found.pays_from:,} tokens on" in verdict(found)

    def test_where_it_never_pays_nothing_is_promised(self):
        """The whole context of the model lies on the card, and no draft token is ever right."""
        found = make_report(replace(ask("qwen3-0.6b", 16384), retrieval=0.0))
        assert found.way == "plain"
        assert found.pays_from is None
        assert "pays" not in verdict(found)

    def test_drafts_that_are_never_right_leave_plain_decoding_over_the_link(self):
        found = make_report(replace(ask(), retrieval=0.05, draft_kind="none"))
        assert found.way == "plain"
        assert not found.plain.on_card
        assert "by plain decoding, which drafting would slow down" in verdict(found)

    def test_who_asks_for_drafts_gets_them(self):
        found = make_report(ask(context=16384, gamma=4))
        assert (found.way, found.settings.gamma) == ("hierarchy", 4)
        found = make_report(replace(ask(context=16384, gamma=4), retrieval=0.1))
        assert found.way == "hierarchy"
        assert "which plain decoding (--gamma 0) beats" in verdict(found)

    def test_who_asks_for_plain_decoding_gets_it(self):
        found = make_report(ask(gamma=0))
        assert found.hierarchy is found.plain
        assert verdict(found).endswith("by plain decoding.")

    def test_a_card_with_room_for_plain_decoding_alone(self):
        asked = ask(ram=None, hidden_states="device", prefill_chunk=1024)
        bare = footprint(asked.model, Settings(gamma=0, budget=80), asked.context).vram_bytes
        tight = replace(asked, machine=replace(asked.machine, memory=int(1.001 * bare)))
        found = make_report(tight)
        assert found.hierarchy.missing
        assert (found.way, found.missing) == ("plain", [])
        assert "since there is no room for a retrieval cache" in verdict(found)
        report = as_dict(found)
        assert report["ms_per_token"] is report["tokens_per_pass"] is None
        assert report["ms_per_token_plain"] == found.ms_per_token > 0

    def test_a_quantisation_that_would_keep_all_of_it_on_the_card(self):
        asked = ask("qwen2.5-7b-1m", 196608)
        asked = replace(asked, variants=tuple(asked.model.quantized(q) for q in ("nf4", "int8")))
        found = make_report(asked)
        assert not found.chosen.on_card
        assert found.packed_fits == "--quantize int8", "the one that changes least"
        assert "with --quantize int8, all of the KV cache would fit on the card" in notes(found)
        whole = make_report(replace(asked, model=asked.model.quantized("int8"), variants=()))
        assert whole.plain.on_card

    def test_more_positions_than_there_are(self):
        said = verdict(make_report(ask("qwen3-8b")))
        assert said.startswith("Fits, but `generate` refuses more than the model's 40,960 positions: ")

    def test_what_does_not_fit_and_what_would(self):
        asked = ask("qwen3-14b", 40960, ram=4)
        asked = replace(asked, variants=tuple(asked.model.quantized(q) for q in ("nf4", "int8")))
        said = verdict(make_report(asked))
        assert said.startswith("Does not fit: it takes ")
        for words in ("device memory where there are 25.1 GB", "host memory where there are 4.00 GB", "too little"):
            assert words in said
        assert said.endswith("--quantize nf4 would make it fit.")

    def test_one_thing_missing_gets_two_ways_out(self):
        said = verdict(make_report(ask("llama-2-7b-128k", ram=48, wire="raw")))
        assert said.endswith("--ram 72GB or --context 96256 would make it fit.")


class TestLoading:
    """What it takes before there are caches."""

    def test_a_gguf_file_is_unpacked_in_host_memory(self, tmp_path):
        shape = replace(find_shape("llama-3.1-8b"), gguf=tmp_path / "m.gguf")
        assert unpacked_bytes(shape) == 2 * 8_030_261_248
        for quantize, largest in ((None, 0), ("nf4", 2 * 4096 * 14336), ("int8", 2 * 4096 * 14336)):
            packed = shape.quantized(quantize)
            took = loading(packed)
            assert took.host == HOST_OVERHEAD + unpacked_bytes(shape)
            assert took.device == DEVICE_OVERHEAD + packed.weights.total + largest, "one layer is unpacked at a time"
        assert loading(find_shape("llama-3.1-8b")).host == HOST_OVERHEAD

    def test_it_counts_where_it_is_the_most(self, tmp_path):
        (tmp_path / "m.gguf").write_bytes(b"")
        asked = ask(context=16384, ram=16)
        asked = replace(asked, model=replace(asked.model, gguf=tmp_path / "m.gguf"))
        found = make_report(asked)
        assert found.used.host_bytes == found.used.loading.host
        assert found.missing == [{"what": "host memory", "bytes": found.used.loading.host - 16 * GB}]
        assert "m.gguf" in notes(found)[0]

    def test_a_draft_is_loaded_after_the_target(self, tmp_path):
        target, draft = find_shape("qwen3-8b"), replace(find_shape("qwen3-0.6b"), gguf=tmp_path / "m.gguf")
        took = loading(target, draft)
        assert took.device == DEVICE_OVERHEAD + target.weights.total + draft.weights.total
        assert took.host == HOST_OVERHEAD + unpacked_bytes(draft)
        assert loading(target, target) == loading(target)


def test_the_command_names_what_was_named():
    asked = replace(ask("qwen3-8b", 32768), source="./my model", draft_source="ngram+qwen3-0.6b", fixed=("gamma",))
    found = make_report(replace(asked, settings=Settings(gamma=8)))
    words = (
        "offload-triforce generate --model './my model' --draft ngram+qwen3-0.6b --prompt-file prompt.txt --context "
    )
    assert command(found).startswith(words)
    other = make_report(replace(asked, model=find_shape("qwen3-8b", torch.float16).quantized("int8")))
    assert command(other).endswith("--quantize int8 --dtype float16")


@pytest.mark.parametrize(("context", "host"), [(131072, 17), (262144, 27)])
def test_a_27b_on_a_card_of_16_gb(context, host):
    """Packed to 4 bits, its output embedding to 8, and all else as it is chosen: no other setting is asked for."""
    asked = replace(ask("qwen3.6-27b", context, ram=32), machine=of_card(find_card("RTX 5070 Ti"), 32 * GB))
    packed = asked.model.quantized("nf4", "int8")
    found = make_report(replace(asked, model=packed))
    assert not found.missing
    assert found.way == "hierarchy"
    assert found.used.vram_bytes <= 16 * 2**30 * 0.975
    assert found.used.host_bytes < host * GB
    assert found.used.host["input embeddings"] == 248320 * 5120 * 2
    # By hand: 24.35 billion weights of 4.127 bits, an output embedding of a byte each, and 0.01 GB of norms and tables.
    assert found.used.held["weights"] == pytest.approx(24.35e9 * 4.127 / 8 + 248320 * 5120 + 0.01e9, rel=1e-3)
    refused = make_report(replace(asked, variants=(packed, asked.model.quantized("nf4"))))
    first = refused.suggestions[0]
    assert (first["option"], first["why"]) == (packed.packing, "weights take 13.8 GB of the card then")
