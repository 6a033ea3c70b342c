"""Time lines: written as Perfetto wants them, and counted right."""

from __future__ import annotations

import json

import pytest
import torch

from offload_triforce.scheduler.emulated import EmulatedDevice
from offload_triforce.scheduler.trace import Span, Trace, busy


def test_file(tmp_path):
    trace = Trace()
    trace.add(Span("b", "later", 2.0, 2.5))
    trace.add(Span("a", "copy", 1.0, 1.5, size=10**9))
    trace.write(tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    names, spans = events[:2], events[2:]
    assert [(e["ph"], e["args"]["name"]) for e in names] == [("M", "a"), ("M", "b")]
    assert [(e["name"], e["ts"], e["dur"], e["tid"]) for e in spans] == [("copy", 0, 5e5, 0), ("later", 1e6, 5e5, 1)]
    assert spans[0]["args"] == {"bytes": 10**9, "GB/s": pytest.approx(2.0)}


def test_spans_known_later_are_asked_once():
    trace, asked = Trace(), []
    trace.add_later(lambda: asked.append(1) or Span("a", "x", 0.0, 1.0))
    assert len(trace.spans()) == len(trace.spans()) == len(asked) == 1


def test_busy_counts_overlaps_once():
    spans = [Span("a", "", 0, 2), Span("a", "", 1, 3), Span("a", "", 1, 2), Span("b", "", 0, 9), Span("a", "", 5, 6)]
    assert busy(spans, "a") == 4


def test_emulated_device_traces_copies_and_computation():
    trace = Trace()
    device = EmulatedDevice(gbps=0.001, trace=trace)
    device.incoming.submit(torch.zeros(5), torch.ones(5)).wait()
    device.launch("work", lambda: None)
    device.close()
    assert [(s.track, s.name, s.size) for s in trace.spans()] == [
        ("host to device", "0.00 MB", 20),
        ("compute", "work", 0),
    ]
    assert all(span.end >= span.start for span in trace.spans())
