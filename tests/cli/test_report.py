"""What is said about a run."""

import io
import json
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from offload_triforce import TriForce
from offload_triforce.cli import report
from offload_triforce.cli.loading import Loading
from offload_triforce.generation.answer import Generation
from offload_triforce.speculation.stats import DecodeStats
from tests.tiny import prompt_ids, tiny_model

SMALL = {"chunk": 4, "sink": 4, "recent": 16, "tile": 32, "budget": 64, "gamma": 4, "draft_cache": 64}


@pytest.mark.parametrize(
    ("family", "changes", "line"),
    [
        ("llama", {}, "CPU, float32; KV cache for 62 tokens (18.4 KB) in host memory"),
        (
            "llama",
            {"link_gbps": 0.25, "resident": 0.5},
            "CPU, float32; KV cache for 62 tokens (18.4 KB) in host memory behind an emulated link of 0.25 GB/s, "
            "50% of it resident on the device",
        ),
        ("mistral-sliding", {}, "CPU, float32; KV cache for 62 tokens on the device: every layer has a sliding window"),
    ],
)
def test_where_the_cache_lies(family, changes, line):
    with TriForce(tiny_model(family), draft="none", **SMALL, **changes) as engine:
        assert engine.runtime is None
        engine.stream(prompt_ids(60), max_new_tokens=2, do_sample=False)
        assert report.opening(engine) == line
        assert engine.runtime.context == 62
    assert engine.runtime is None


def test_where_the_cache_lies_on_a_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    plan = SimpleNamespace(layers=2, tiles=34, tile_bytes=10**9, coded_bytes=0, resident=0.117)
    runtime = SimpleNamespace(context=131_072, plan=plan, settings=SimpleNamespace(link_gbps=None))
    layout = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    assert report.opening(SimpleNamespace(layout=layout, runtime=runtime)) == (
        "NVIDIA GeForce RTX 4090, bfloat16; KV cache for 131,072 tokens (68.0 GB) in host memory, 12% of it resident "
        "on the device"
    )


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("stop", "stop (the answer ended): 8 tokens, 250 ms/token"),
        ("length", "length (the limit of new tokens): 8 tokens, 250 ms/token"),
        ("stop_string", "stop_string (one of --stop): 8 tokens, 250 ms/token"),
        ("max_time", "max_time: 8 tokens, 250 ms/token"),
        (None, "unfinished: 8 tokens, 250 ms/token"),
        ("interrupted", "interrupted: 8 tokens, 250 ms/token"),
    ],
)
def test_why_it_stopped(reason, words):
    stats = DecodeStats(new_tokens=8, decode_s=2.0, interrupted=reason == "interrupted", ending=reason)
    result = Generation("text", [1], [2], stats, stats.finish_reason)
    assert report.closing(result) == words
    assert json.loads(report.as_json(result))["finish_reason"] == reason


def test_no_link_where_there_is_none():
    counts = {"link_bytes": 10**6, "raw_link_bytes": 10**6, "full_kv_bytes": 10**7}
    stats = DecodeStats(prompt_tokens=9, new_tokens=8, passes=2, **counts)
    assert not any("link" in line for line in report.summary(stats, link=False))
    assert report.summary(stats, link=True)[-1] == "link: 0.1 MB/token; the full KV cache has 10.0 MB, 80.0x as much"


@pytest.mark.parametrize("interactive", [True, False])
def test_a_session_that_is_read_first_shows_among_the_bars(interactive):
    """And nobody is told any more when they are gone."""
    written, loading = io.StringIO(), Loading()
    console = Console(file=written, force_terminal=interactive, force_interactive=interactive, width=80)
    loading(1, 2)
    with report.bars(console, loading) as (progress, _):
        loading(300, 1000)
        progress(1, 10)
    loading(2, 2)
    said = written.getvalue()
    assert ("loading the session" in said) is interactive
    assert ("30%" in said) is interactive
