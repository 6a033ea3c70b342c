"""The command that tries every family: it finds what is wrong, and survives what crashes."""

import json
import sys

import pytest
import transformers

from benchmarks import families, family_audit
from benchmarks.family_audit import Finding, try_case
from benchmarks.family_cases import VARIANTS, Case, cases_of
from benchmarks.family_page import documented, render
from benchmarks.tiny_families import model_types
from benchmarks.tiny_sizes import ADJUSTMENTS
from offload_triforce import TriForce, UnsupportedModelError
from offload_triforce.model import adapter

QUICK = {"PROMPT": 180, "NEW": 30, "LIVELY": 4}
VERSIONS = {"transformers": "5.x", "torch": "2.x"}


@pytest.fixture(autouse=True)
def short_texts(monkeypatch):
    for name, value in QUICK.items():
        monkeypatch.setattr(family_audit, name, value)


def test_equal():
    found = try_case(Case("cohere2"))
    assert (found.verdict, found.model, found.kinds) == ("equal", "Cohere2ForCausalLM", ("full", "sliding"))
    assert 0 < found.accepted < found.judged
    assert found.drafted > 0


def test_refused():
    found = try_case(Case("llama", "bidirectional", {"is_causal": False}))
    assert (found.verdict, found.model) == ("refused", "LlamaForCausalLM")
    assert "is_causal is False" in found.why


def test_wrong(monkeypatch):
    """A scale of attention that is a little off."""
    params = adapter.AttentionParams
    monkeypatch.setattr(adapter, "AttentionParams", lambda scale, *others: params(1.3 * scale, *others))
    found = try_case(Case("llama"))
    assert found.verdict == "wrong"
    assert "of 30 on" in found.why


def test_crashes(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("a first line\nthat it broke")

    monkeypatch.setattr(TriForce, "generate", fails)
    found = try_case(Case("llama"))
    assert (found.verdict, found.why) == ("crash", "RuntimeError: that it broke")


def test_planning_otherwise_than_loading_is_a_crash(monkeypatch):
    def refuse(*_):
        raise UnsupportedModelError("not for planning")

    monkeypatch.setattr(family_audit, "shape_of", refuse)
    found = try_case(Case("llama"))
    assert (found.verdict, found.why) == ("crash", "loaded, but not planned: not for planning")


def test_no_such_configuration():
    found = try_case(Case("llama", "odd", {"num_attention_heads": 5}))
    assert found.verdict == "unbuilt"
    assert "multiple of the number of attention heads" in found.why


def test_a_case_that_ends_its_process_takes_no_other_with_it(monkeypatch, tmp_path):
    """A worker that answers once, and then ends at each second case that it is given."""
    answer = json.dumps(Finding("?", "", "Model", "equal").as_dict())
    worker = tmp_path / "python"
    worker.write_text(
        f"#!{sys.executable}\n"
        "import json, os, sys\n"
        "case = json.load(sys.stdin)['cases'][0]\n"
        f"print({answer!r}.replace('?', case['model_type']), flush=True)\n"
        "os._exit(3)\n"
    )
    worker.chmod(0o755)
    monkeypatch.setattr(families.sys, "executable", str(worker))
    found = families.run_batch([Case(name) for name in "abcde"], 1)
    assert [one.model_type for one in found] == list("abcde")
    assert [one.verdict for one in found] == ["equal", "crash", "equal", "crash", "equal"]
    assert found[1].why == "its process ended with code 3"


def test_the_program_itself():
    found = families.run_batch([Case("bloom"), Case("mamba")], 60)
    assert [one.verdict for one in found] == ["refused", "refused"]


def test_cases():
    """Windows on and off, the variants of the table, and every boolean turned on demand."""
    types = model_types()
    names = {kind: [case.variant for case in cases_of(kind)] for kind in ("llama", "mistral", "qwen2", "gemma3_text")}
    assert names["mistral"] == ["", "full layers alone"]
    assert names["qwen2"] == ["", "sliding window"]
    assert names["gemma3_text"] == ["", "full layers alone", "bidirectional"]
    assert names["llama"][0] == ""
    assert "YaRN" in names["llama"]
    flipped = [case for case in cases_of("llama", flips=True) if "=" in case.variant]
    assert {"attention_bias=True", "mlp_bias=True"} <= {case.variant for case in flipped}
    if transformers.__version__ >= "5.24":
        assert set(VARIANTS) | set(ADJUSTMENTS) <= set(types)


def test_the_page():
    findings = [
        Finding("llama", "", "LlamaForCausalLM", "equal", kinds=("full", "sliding")),
        Finding("llama", "YaRN", "LlamaForCausalLM", "equal"),
        Finding("llama", "odd", "LlamaForCausalLM", "refused", "LlamaForCausalLM is odd"),
        Finding("a", "", "AModel", "refused", "AModel has 2 of 4 layers of type 'x'"),
        Finding("b", "", "BModel", "refused", "BModel has 1 of 4 layers of type 'x'"),
    ]
    page = render(findings, VERSIONS)
    assert "| `llama` | LlamaForCausalLM | full and sliding | YaRN |" in page
    assert "| has layers of type 'x' | `a`, `b` |" in page
    assert "| `llama` | odd | is odd |" in page
    assert "1 model types run, 2 are refused" in page
    assert documented(page) == ({"llama"}, {"a", "b"})
